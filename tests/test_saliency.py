"""Sensitivity maps: against finite differences and plain autograd on the transformers model itself, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from analyses.saliency import Measure, measured, saliency
from analyses.targets import Targets, answer_targets, prompt_targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.world import Scene


@pytest.fixture(scope="module")
def exact() -> HookedMM:
    return HookedMM.small("llava", dtype="float64", check=False)


def asked(model: HookedMM, scenes: list[Scene], side: str = "left") -> tuple[Batch, Targets]:
    text = ["what place is this ?", "how many objects are there ?"]
    batch = model.prepare([[picture(one)] for one in scenes[:2]], text, padding_side=side)
    return batch, prompt_targets(batch, [20, 30])


@pytest.mark.parametrize("point", ["hook_embed", "vision.hook_embed", "projector.hook_out"])
def test_signed_input_is_the_derivative_by_the_size_of_what_stands_there(
    exact: HookedMM, scenes: list[Scene], point: str
) -> None:
    """d/da s(a x_j) at a = 1 by differences of fourth order, where it is largest (norms of this family are float32)."""
    batch, targets = asked(exact, scenes)
    found = saliency(exact, batch, targets, point, measure="signed input")
    step = 0.02
    for row in range(2):
        place = int(found[row].abs().argmax())

        def score(size: float, row: int = row, place: int = place) -> float:
            def grown(value: Tensor, hook: object) -> Tensor:
                new = value.clone()
                new[row, place] *= size
                return new

            with torch.no_grad():
                return float(targets.scores(exact.run_with_hooks(batch, [(point, grown)]))[row])

        near, far = ((score(1 + size) - score(1 - size)) / (2 * size) for size in (step, 2 * step))
        assert float(found[row, place]) == pytest.approx((4 * near - far) / 3, rel=2e-3)
    sizes = saliency(exact, batch, targets, point, measure="input")
    assert torch.equal(sizes, found.abs())


@pytest.mark.parametrize("kind", ["logit", "log_prob"])
def test_the_norm_is_that_of_plain_autograd(exact: HookedMM, scenes: list[Scene], kind: str) -> None:
    batch, targets = asked(exact, scenes)
    _, cache = exact.run_with_cache(batch, "hook_embed")
    embeds = cache["hook_embed"].detach().requires_grad_()
    language, head = exact.hf_model.model.language_model, exact.hf_model.lm_head
    positions = (batch.inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    states = language(
        inputs_embeds=embeds, attention_mask=batch.inputs["attention_mask"], position_ids=positions
    ).last_hidden_state
    logits = head(states)
    score = torch.zeros((), dtype=torch.float64)
    for sample, row, token in zip(targets.sample, targets.row, targets.token, strict=True):
        own = logits[sample, row]
        score = score + (own[token] if kind == "logit" else own[token] - own.exp().sum().log())
    score.backward()
    found = saliency(exact, batch, targets, kind=kind)  # type: ignore[arg-type]
    assert (found - embeds.grad.norm(dim=-1)).abs().max() < 1e-8


def test_companions_and_padding_do_not_matter(exact: HookedMM, scenes: list[Scene]) -> None:
    batch, targets = asked(exact, scenes)
    both = saliency(exact, batch, targets)
    right = asked(exact, scenes, "right")
    other = saliency(exact, *right)
    for sample in range(2):
        alone, own = asked(exact, scenes)[0].take([sample]), targets.take([sample])
        single = saliency(exact, alone, Targets(torch.tensor([0]), own.row, own.token))
        assert torch.allclose(single[0], both[sample], atol=1e-10)
        assert torch.allclose(both[sample][batch.mask()[sample]], other[sample][right[0].mask()[sample]], atol=1e-10)


def test_bad_input_is_refused(llava: HookedMM, scenes: list[Scene]) -> None:
    batch = llava.prepare(picture(scenes[0]), ["describe the scene ."], answers=["a red star"])
    with pytest.raises(BadInputError, match=r"targets.rounds\(\)"):
        saliency(llava, batch, answer_targets(batch))
    with pytest.raises(BadInputError, match="'sum'"):
        measured(torch.ones(2, 3), torch.ones(2, 3), "sum")  # type: ignore[arg-type]
    measure: Measure = "norm"
    assert measured(torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2, 3), 2.0), measure).dtype == torch.float32
