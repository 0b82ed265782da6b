"""Grad-CAM: against finite differences of the target, by layer and row; which maps are empty, and that this is said."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from analyses.grad_cam import default_point, grad_cam
from analyses.targets import Targets, answer_targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import Hook
from hooked_mm.testing.miniatures import known, miniature, miniature_inputs
from tests.test_pattern_gradients import exact_norm

ASKED = ["what place is this ?", "what colour is the object at the top left ?"]
SAID = ["city", "a red star"]


@cache
def wide() -> HookedMM:
    return HookedMM.small("llava", dtype="float64", check=False)


@pytest.fixture(scope="module")
def batch(images: list[Image.Image]) -> Batch:
    return wide().prepare(images[:2], ASKED, answers=SAID)


def by_differences(
    model: HookedMM, batch: Batch, target: Targets, layer: int, query: int, keys: list[int]
) -> list[float]:
    """mean_h relu(dl/dA * A) at some keys, l the log-probability, by moving single entries of the pattern."""
    point, step = f"blocks.{layer}.attn.hook_pattern", 1e-4
    sample, row, token = (int(value) for value in (target.sample, target.row, target.token))
    _, kept = model.run_with_cache(batch, point)

    def score(head: int, key: int, by: float) -> float:
        def move(value: Tensor, hook: Hook) -> Tensor:
            value = value.clone()
            value[sample, head, query, key] += by
            return value

        logits = model.run_with_hooks(batch, [(point, move)])
        assert logits is not None
        return float(logits[sample, row].log_softmax(-1)[token])

    found = []
    for key in keys:
        slopes = [(score(head, key, step) - score(head, key, -step)) / (2 * step) for head in range(4)]
        values = kept[point][sample, :, query, key].tolist()
        found.append(sum(max(slope * value, 0) for slope, value in zip(slopes, values, strict=True)) / 4)
    return found


def test_maps_are_those_of_the_targets_finite_differences(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second token of an answer of three, whose row is the first one's position; that row, and the question's."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    # What is wrapped keeps the forward that it had.
    model = HookedMM.small("llava", dtype="float64", check=False)
    target = answer_targets(batch).take([2])
    image = batch.mask("image")[1].nonzero()[:, 0]
    for rows in ("target", "question"):
        found = grad_cam(model, batch, target, rows=rows, layers=[2], kind="log_prob")
        own = found.maps[0][0][:, image]
        line = int(own.amax(1).argmax())
        keys = image[own[line].topk(2).indices].tolist()
        query = int(found.queries[0][line])
        assert (query == int(target.row)) == (rows == "target")
        expected = by_differences(model, batch, target, 2, query, keys)
        assert min(expected) > 1e-6
        assert found.maps[0][0, line, keys].tolist() == pytest.approx(expected, rel=1e-5)


def test_question_maps_at_the_last_layer_are_said_to_be_empty_and_not_drawn_as_noise(batch: Batch) -> None:
    """The LLaVA-Med notebook scales them to the full range: nothing behind moves what questions have read."""
    targets = answer_targets(batch, "first")
    found = grad_cam(wide(), batch, targets, rows="question", layers=[4, -1])
    assert found.layers == (4, 5)
    for maps, reached in zip(found.maps, found.reached, strict=True):
        assert reached[0].all()
        assert maps[0].any()
        assert not reached[1].any()
        assert not maps[1].any()
    lines = sum(len(own) for own in found.queries)
    assert found.notes == (
        f"layer 5: {lines} of {lines} maps are empty, as their rows have no gradient there (nothing behind moves what "
        "they read to the target's row)",
    )
    assert grad_cam(wide(), batch, targets, layers=[-1]).notes == ()
    torch.testing.assert_close(found.mean(0), found.maps[0][0].mean(0))


def test_the_mean_is_of_all_layers_that_have_a_gradient_or_of_one(batch: Batch) -> None:
    """The last layer's question rows are empty, and thin out no mean."""
    found = grad_cam(wide(), batch, answer_targets(batch, "first"), rows="question")
    for number in range(len(found.targets)):
        maps, last = found.maps[number], found.layers[-1]
        assert not found.mean(number, last).any()
        torch.testing.assert_close(found.mean(number, 2), maps[2].mean(0))
        torch.testing.assert_close(found.mean(number), maps[:-1].flatten(0, 1).mean(0))


def test_rows_behind_the_target_have_no_gradient_at_any_layer(batch: Batch) -> None:
    """The answer's own later tokens come after what predicts its first."""
    targets = answer_targets(batch, "first").take([1])
    found = grad_cam(wide(), batch, targets, rows="answer", layers=[1])
    assert len(found.queries[0]) == 3
    assert not found.reached[0].any()
    assert not found.mean(0).any()
    assert "3 of 3 maps are empty" in found.notes[0]


def test_the_target_is_the_chosen_tokens_logit(batch: Batch) -> None:
    """Not the likeliest one's; with a foil it is their difference."""
    chosen = answer_targets(batch, "first")
    logits = wide().hf_model(**batch.inputs).logits
    other = logits[torch.arange(2), chosen.row].argsort(-1, descending=True)
    foil = torch.where(other[:, 0] == chosen.token, other[:, 1], other[:, 0])
    one = grad_cam(wide(), batch, chosen, layers=[2])
    against = grad_cam(wide(), batch, Targets(chosen.sample, chosen.row, chosen.token, foil), layers=[2])
    swapped = grad_cam(wide(), batch, Targets(chosen.sample, chosen.row, foil), layers=[2])
    torch.testing.assert_close(against.scores, one.scores - swapped.scores)
    for first, second in ((one, swapped), (one, against)):
        for mine, theirs in zip(first.maps, second.maps, strict=True):
            assert (mine - theirs).abs().sum() > 0.05 * mine.abs().sum()


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_companions_nor_padding_change_a_map(side: str, images: list[Image.Image], batch: Batch) -> None:
    both = wide().prepare(images[:2], ASKED, answers=SAID, padding_side=side)
    targets = answer_targets(both)
    for rows in ("target", "question"):
        together = grad_cam(wide(), both, targets, rows=rows, layers=[0, 3])
        for sample in range(2):
            alone = wide().prepare(images[sample], ASKED[sample], answers=[SAID[sample]])
            found = grad_cam(wide(), alone, answer_targets(alone), rows=rows, layers=[0, 3])
            own = (both.modality[sample] != 0).nonzero()[:, 0]
            mine = [maps for maps, of in zip(together.maps, targets.sample, strict=True) if of == sample]
            for here, there in zip(mine, found.maps, strict=True):
                torch.testing.assert_close(here[..., own], there, rtol=1e-6, atol=1e-12)


def test_only_the_layers_asked_for_are_kept(batch: Batch) -> None:
    found = grad_cam(wide(), batch, answer_targets(batch), layers=[3])
    assert [tuple(maps.shape) for maps in found.maps] == [(1, 1, batch.modality.shape[1])] * 4


@pytest.mark.parametrize(
    ("family", "point", "keys"), [("florence2", "xattn", 26), ("mllama", "xattn", 68), ("qwen3_5", "attn", 13)]
)
def test_cross_attention_is_taken_where_there_is_one(family: str, point: str, keys: int, unchecked: None) -> None:
    """Also where only some layers attend at all."""
    if family not in known((family,)):
        pytest.skip(f"this version of transformers has no {family}")
    plain = miniature(family)
    model = HookedMM(plain, check=False)
    made = model._batch(miniature_inputs(plain))
    last = (made.decoder or made).modality.shape[1] - 1
    assert default_point(model) == f"blocks.{{}}.{point}.hook_pattern"
    found = grad_cam(model, made, Targets(torch.tensor([2]), torch.tensor([last]), torch.tensor([7])))
    assert found.maps[0].shape == (len(found.layers), 1, keys)
    assert found.maps[0].any()
    if family == "qwen3_5":
        with pytest.raises(BadInputError, match=r"at layers \[1, 3\]"):
            grad_cam(model, made, found.targets, layers=[0])


def test_bad_requests_are_refused(batch: Batch, unchecked: None) -> None:
    targets = answer_targets(batch)
    for options, why in (
        ({"layers": [9]}, r"layers=\[9\]"),
        ({"layers": []}, "choose among them"),
        ({"point": "blocks.{}.attn.hook_z"}, "is no pattern by layer"),
        ({"point": "encoder.blocks.{}.attn.hook_pattern"}, "choose among them"),
    ):
        with pytest.raises(BadInputError, match=why):
            grad_cam(wide(), batch, targets, **options)
    if "diffusion_gemma" in known(("diffusion_gemma",)):
        mixed = HookedMM(miniature("diffusion_gemma"), check=False)
        made = mixed._batch(miniature_inputs(mixed.hf_model))
        with pytest.raises(BadInputError, match=r"attend to \[12, 18\] keys"):
            grad_cam(mixed, made, Targets(torch.tensor([2]), torch.tensor([4]), torch.tensor([7])))
    bare = wide().prepare(None, ["what place is this ?"], answers=["city"])
    with pytest.raises(BadInputError, match="has none of the rows"):
        grad_cam(wide(), bare, answer_targets(bare), rows="image")
