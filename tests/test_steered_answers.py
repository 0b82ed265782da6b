"""Steered answers: each equals a plain loop of PyTorch hooks, one sample at a time, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from concept_dict.kmeans import KMeans
from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.positions import LAST_PROMPT
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.steering_vector import SteeringVector
from steering.gate import ConceptAbove, Gate, learn_gate
from steering.setting import Setting
from steering.steered_answers import SteeredAnswers
from tests.answers_by_hand import (
    LAYERS,
    POINT,
    by_hand,
    check_by_hand,
    gate_between,
    said,
    samples,
    some_settings,
    vector,
)


def test_answers_are_those_of_plain_hooks_at_batch_one(llava: HookedMM, images: list[Image.Image]) -> None:
    """Batched, padded on the left, continued from a shared cache: token for token a plain loop.

    As XL-VLMs at best: it steers one sample at a time.
    """
    data = samples(images)
    settings = [
        *some_settings(llava, (0.5, 2.0))[::2],
        Setting(vector(llava, 3, 9), 2.0, gate=gate_between(llava, data)),
    ]
    check_by_hand(llava, "llava", data, settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAYERS))
def test_answers_are_those_of_plain_hooks_for_every_small_model(name: str, images: list[Image.Image]) -> None:
    """All settings, and gates, on every architecture that ships."""
    model = HookedMM.small(name, check=False)
    data = samples(images)
    gate = gate_between(model, data)
    gated = [Setting(vector(model, 3, 9), alpha, gate=gate) for alpha in (0.5, 2.0)]
    check_by_hand(model, name, data, [*some_settings(model), *gated])


@given(
    order=st.permutations(range(5)),
    cut=st.integers(1, 5),
    rows=st.integers(1, 40),
    which=st.lists(st.integers(0, 8), min_size=1, max_size=5),
)
def test_answers_do_not_depend_on_their_company(
    llava: HookedMM, images: list[Image.Image], order: list[int], cut: int, rows: int, which: list[int]
) -> None:
    """On the samples of the batch, their order, the number of settings beside, how many rows a generation takes."""
    data = samples(images)
    pool = some_settings(llava, (0.5, 2.0))[:9]
    if not _WHOLE:
        _WHOLE.update(said(llava, data, pool))
    for part in (order[:cut], order[cut:]):
        if part:
            for name, texts in said(llava, data, [pool[n] for n in which], part, rows=rows).items():
                assert texts == [_WHOLE[name][0], *(_WHOLE[name][1 + n] for n in which)]


_WHOLE: dict[str, list[str]] = {}


def test_xl_vlms_fault_one_alpha_for_all(llava: HookedMM, images: list[Image.Image], monkeypatch: Any) -> None:
    """Many alphas, layers and samples share generations; the store keeps them apart, in the order they came in."""
    calls: list[int] = []
    real = HookedMM.generate

    def counted(self: HookedMM, batch: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(batch))
        return real(self, batch, *args, **options)

    monkeypatch.setattr(HookedMM, "generate", counted)
    settings = [Setting(vector(llava, layer, 1), alpha) for alpha in (0.0, 0.5, 1.0, 2.0) for layer in (1, 2, 3)]
    data = samples(images)
    found = said(llava, data, settings)
    # The proof that prompts can be shared takes two generations at most.
    assert calls.count(5 * 13) == 1
    assert len(calls) <= 3
    for texts in found.values():
        # alpha 0 is the model as it is.
        assert texts[1:4] == [texts[0]] * 3


def test_xl_vlms_fault_the_vector_at_padding_or_pictures(llava: HookedMM, images: list[Image.Image]) -> None:
    """What is said is steered, and nothing that was asked: no position of a prompt but its last, no padding."""
    data = samples(images)
    batch = llava.prepare([sample.images for sample in data], [sample.text for sample in data])
    assert not bool(batch.inputs["attention_mask"].all())
    from steering.setting import side_by_side

    hook, seen = "blocks.2.hook_resid_post", []
    hooks = side_by_side([Setting(vector(llava, 2, 0), 2.0)] * len(data))
    before = llava.run_with_cache(batch, hook)[1][hook]
    with llava.hooks([*hooks, (hook, lambda value, _: seen.append(value.clone()))]):
        llava.generate(batch, 3)
    moved = (seen[0] - before).norm(dim=-1) > 1e-3
    expected = torch.zeros_like(moved)
    expected[:, -1] = True
    assert torch.equal(moved, expected)


def test_xl_vlms_fault_hooks_that_stay_after_an_error(
    llava: HookedMM, images: list[Image.Image], monkeypatch: Any
) -> None:
    """A generation that ends in an error leaves the model as it was."""
    data = samples(images)
    settings = [Setting(vector(llava, 2, 0), 3.0)]
    plain = said(llava, data, settings)
    block = llava.hf_model.get_submodule(LAYERS["llava"].format(4))
    hooks = len(block._forward_hooks)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of it")

    handle = block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        said(llava, data, settings)
    handle.remove()
    assert llava._active == []
    assert len(block._forward_hooks) == hooks
    for sample in data:
        assert by_hand(llava, "llava", sample, Setting()) == plain[sample.id][0]


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (SteeringVector(torch.ones(64), "blocks.2.hook_resid_post", name="narrow"), "has length 64"),
        (SteeringVector(torch.ones(1), "blocks.2.hook_resid_post", name="scalar"), "has length 1,"),
        (SteeringVector(torch.ones(128), "blocks.9.hook_resid_post", name="deep"), "blocks.9"),
        (SteeringVector(torch.ones(128), "blocks.2.hook_resid_post", name="v", model="other"), "one of the model"),
    ],
)
def test_xl_vlms_fault_vectors_of_another_model(llava: HookedMM, made: SteeringVector, match: str) -> None:
    """Refused before anything is said, not broadcast; also as what acts beside another."""
    own = SteeringVector(torch.ones(128), "blocks.2.hook_resid_post")
    settings = [Setting(made), Setting(own, also=(Setting(made),))]
    if made.hook == own.hook:
        settings.append(Setting(own, operation="rotate", second=made))
    for setting in settings:
        with pytest.raises(BadInputError, match=match):
            SteeredAnswers(llava, [setting])


def test_what_can_not_be_answered_is_refused(llava: HookedMM) -> None:
    """No settings, no rows."""
    for settings, rows in (([], 8), ([Setting()], 0)):
        with pytest.raises(BadInputError, match="at least one of each"):
            SteeredAnswers(llava, settings, rows=rows)


def last_rows(model: HookedMM, data: Sequence[Sample]) -> Tensor:
    """Activations at the last prompt position."""
    batch = model.prepare([sample.images for sample in data], [sample.text for sample in data])
    return model.run_with_cache(batch, POINT, stop_at_layer=3)[1][POINT][:, -1]


def test_samples_that_a_gate_is_shut_for_stay_token_for_token(llava: HookedMM) -> None:
    """All of them, by a learnt gate and by a concept of a dictionary; the others change."""
    learn, judged = (SceneDataset(120, "question", seed=seed) for seed in (0, 1))
    old, new = ([data[number] for number in range(len(data))] for data in (learn, judged))
    rows = last_rows(llava, old)
    places = torch.tensor([sample.columns["question_type"] == "place" for sample in old])
    learnt = learn_gate(rows[places], rows[~places], POINT, "places")
    fitted = KMeans(8, random_state=0).fit(rows)
    active = fitted.transform(rows)
    concept = int(active[places].sum(0).argmax())
    by_concept = Gate(
        ConceptAbove(fitted=fitted, concept=concept, threshold=0.5, point=POINT, over="mean", at=LAST_PROMPT), "concept"
    )
    steer = vector(llava, 3, 0, 400.0)
    found = said(llava, new, [Setting(steer, gate=learnt), Setting(steer, gate=by_concept), Setting(steer)])
    rows = last_rows(llava, new)
    opened = torch.stack(
        [rows @ learnt.condition.direction > learnt.condition.threshold, fitted.transform(rows)[:, concept] > 0.5]
    )
    asked = torch.tensor([sample.columns["question_type"] == "place" for sample in new])
    assert float((opened[0] == asked).double().mean()) >= 0.99
    assert bool((opened.sum(dim=1) >= 5).all())
    for place, sample in enumerate(new):
        plain, *gated, always = found[sample.id]
        for gate in range(2):
            assert gated[gate] == (always if opened[gate, place] else plain)
    for gate in range(2):
        moved = [found[sample.id][3] != found[sample.id][0] for at, sample in enumerate(new) if opened[gate, at]]
        assert sum(moved) >= 0.5 * len(moved)
