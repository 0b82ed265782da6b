"""Integrated gradients: a closed form, completeness on models, and gradients that PyTorch alone gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from analyses.integrated_gradients import (
    gradient_times_input,
    integrate,
    integrated_gradients,
    steps_of,
)
from analyses.targets import Targets, answer_targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import known, miniature, miniature_inputs

ASKED = ["what place is this ?", "what colour is the object at the top left ?"]
SAID = ["city", "a red star"]


@cache
def wide() -> HookedMM:
    return HookedMM.small("llava", dtype="float64", check=False)


@pytest.fixture(scope="module")
def batch(images: list[Image.Image]) -> Batch:
    return wide().prepare(images[:2], ASKED, answers=SAID)


@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 6),
    steps=st.integers(1, 5),
    rule=st.sampled_from(["gauss", "midpoint"]),
)
def test_of_a_quadratic_it_is_the_closed_form(seed: int, width: int, steps: int, rule: Any) -> None:
    """f = x' Q x + b x: (x - x0) * (b + (Q + Q') (x + x0) / 2), by any number of steps."""
    generator = torch.Generator().manual_seed(seed)
    q, b = torch.randn(width, width, generator=generator).double(), torch.randn(width, generator=generator).double()
    x, start = torch.randn(2, width, generator=generator).double()

    def score(rows: Tensor) -> Tensor:
        return torch.einsum("mi,ij,mj->m", rows, q, rows) + rows @ b

    found = integrate(score, x, start, steps=steps, rule=rule, size=2)
    torch.testing.assert_close(found, (x - start) * (b + (q + q.T) @ (x + start) / 2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.sum(), score(x[None])[0] - score(start[None])[0], rtol=1e-9, atol=1e-9)


def test_gauss_is_exact_where_midpoints_are_not() -> None:
    """x^6: two factors of a in the gradient's degree of 5 are integrated by three nodes."""
    x = torch.tensor([2.0], dtype=torch.float64)
    for steps, exact in ((2, False), (3, True)):
        found = integrate(lambda rows: rows[:, 0] ** 6, x, torch.zeros_like(x), steps=steps)
        assert (abs(float(found) - 64) < 1e-9) == exact
    coarse = integrate(lambda rows: rows[:, 0] ** 6, x, torch.zeros_like(x), steps=3, rule="midpoint")
    assert 1 < abs(float(coarse) - 64) < 10


def test_rules_have_weights_that_sum_to_one() -> None:
    for rule in ("gauss", "midpoint", "graded"):
        places, weights = steps_of(rule, 7)
        assert float(weights.sum()) == pytest.approx(1)
        assert float((places * weights).sum()) == pytest.approx(0.5)
    assert [value.tolist() for value in steps_of("end", 1)] == [[1], [1]]
    for rule, steps in (("end", 2), ("gauss", 0), ("simpson", 3)):
        with pytest.raises(BadInputError, match=f"rule='{rule}' with {steps} steps"):
            steps_of(rule, steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "baseline", ["mean", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero", "given"))]
)
def test_attributions_add_up_to_what_the_features_add(baseline: str, batch: Batch) -> None:
    """Every target of two samples; f at the baseline by a plain hook that writes it."""
    targets = answer_targets(batch).take([0, 2, 3])
    start: Any = torch.linspace(-2, 2, wide().cfg.d_model).double() if baseline == "given" else baseline
    options: Any = (
        {"steps": 96, "rule": "graded"} if baseline == "zero" else {"steps": 16 if baseline == "mean" else 24}
    )
    found = integrated_gradients(wide(), batch, targets, baseline=start, size=7, **options)
    image = batch.mask("image")

    def write(value: Tensor, hook: object) -> Tensor:
        new = value.clone()
        for sample in range(2):
            own = value[sample][image[sample]]
            new[sample][image[sample]] = 0 if baseline == "zero" else own.mean(0) if baseline == "mean" else start
        return new

    clean, empty = wide().hf_model(**batch.inputs).logits, wide().run_with_hooks(batch, [("hook_embed", write)])
    assert empty is not None
    gained = targets.scores(clean) - targets.scores(empty)
    torch.testing.assert_close(found.scores, targets.scores(clean).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.baseline_scores, targets.scores(empty), rtol=1e-6, atol=1e-6)
    sums = torch.stack([values.sum() for values in found.values])
    assert (sums - gained).abs().max() < 0.02 * gained.abs().max()
    torch.testing.assert_close(found.error, sums - gained, rtol=1e-3, atol=1e-5)
    for values, sample in zip(found.values, targets.sample.tolist(), strict=True):
        assert not values[~image[sample]].any()
        assert values[image[sample]].all()


def test_too_few_steps_are_reported_as_a_number_and_a_note(batch: Batch) -> None:
    first = answer_targets(batch, "first").take([0])
    few = integrated_gradients(wide(), batch, first, steps=1, rule="midpoint")
    many = integrated_gradients(wide(), batch, first, steps=16)
    assert few.error.abs() > 1000 * many.error.abs()
    assert "take more steps" in few.notes[0]
    assert many.notes == ()


@pytest.mark.slow
def test_even_steps_miss_what_features_of_no_size_do_and_graded_ones_do_not(batch: Batch) -> None:
    """The first layer's norm makes of features near zero what it makes of whole ones."""
    first = answer_targets(batch, "first").take([0])
    even = integrated_gradients(wide(), batch, first, baseline="zero", steps=64)
    graded = integrated_gradients(wide(), batch, first, baseline="zero", steps=64, rule="graded")
    gained = (even.scores - even.baseline_scores).abs()
    assert even.error.abs() > 0.3 * gained
    assert graded.error.abs() < 0.03 * gained
    assert "'graded' ones for a baseline of zero" in even.notes[0]


def test_gradient_times_input_is_that_of_pytorch_alone(batch: Batch) -> None:
    """At image positions of the embeddings, one backward pass per target."""
    targets = answer_targets(batch)
    found = gradient_times_input(wide(), batch, targets)
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> Any:
        kept.append(kwargs.get("hidden_states", *args[:1]).detach().requires_grad_())
        return (kept[-1], *args[1:]), kwargs

    handle = wide().hf_model.model.language_model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for number, (sample, row, token) in enumerate(zip(targets.sample, targets.row, targets.token, strict=True)):
        kept.clear()
        wide().hf_model(**batch.inputs).logits[sample, row, token].backward()
        assert kept[0].grad is not None
        expected = (kept[0] * kept[0].grad).sum(-1)[sample].detach() * batch.mask("image")[sample]
        torch.testing.assert_close(found.values[number], expected, rtol=1e-5, atol=1e-9)
    handle.remove()


@pytest.mark.parametrize("side", ["right", pytest.param("left", marks=pytest.mark.slow)])
def test_neither_companions_nor_padding_change_an_attribution(side: str, images: list[Image.Image]) -> None:
    both = wide().prepare(images[:2], ASKED, answers=SAID, padding_side=side)
    targets = answer_targets(both)
    together = integrated_gradients(wide(), both, targets, steps=2, size=3)
    for sample in range(2):
        alone = wide().prepare(images[sample], ASKED[sample], answers=[SAID[sample]])
        found = integrated_gradients(wide(), alone, answer_targets(alone), steps=2)
        own = (both.modality[sample] != 0).nonzero()[:, 0]
        mine = [values for values, of in zip(together.values, targets.sample, strict=True) if of == sample]
        for here, there in zip(mine, found.values, strict=True):
            torch.testing.assert_close(here[own], there, rtol=1e-5, atol=1e-9)


def test_a_pass_holds_no_more_steps_than_asked(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = HookedMM.run_with_hooks

    def counted(model: HookedMM, given: Batch, *args: Any, **options: Any) -> Any:
        rows.append(len(given))
        return real(model, given, *args, **options)

    monkeypatch.setattr(HookedMM, "run_with_hooks", counted)
    integrated_gradients(wide(), batch, answer_targets(batch), steps=5, size=3)
    assert rows == [2, 3, 3, 3, 1]


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_pixels_add_up_too(name: str, images: list[Image.Image]) -> None:
    """A row of pixels per picture, and rows of patches of pictures of different sizes."""
    model = wide() if name == "llava" else HookedMM.small(name, dtype="float64", check=False)
    batch = model.prepare(images[:2], ASKED, answers=SAID)
    targets = answer_targets(batch, "first")
    found = integrated_gradients(model, batch, targets, point="pixel_values", steps=16 if name == "llava" else 96)
    assert sum(values.numel() for values in found.values) == batch.inputs["pixel_values"].numel()
    gained = found.scores - found.baseline_scores
    assert found.error.abs().max() < 0.05 * gained.abs().max()


@pytest.mark.parametrize(("family", "count"), [("mllama", 4 * 17), ("florence2", 26), ("qwen3_vl", 14)])
def test_features_that_enter_elsewhere(family: str, count: int, unchecked: None) -> None:
    """By cross-attention; in an encoder; also behind layers, which is said."""
    if family not in known((family,)):
        pytest.skip(f"this version of transformers has no {family}")
    plain = miniature(family)
    model = HookedMM(plain, check=False)
    batch = model._batch(miniature_inputs(plain))
    last = (batch.decoder or batch).modality.shape[1] - 1
    targets = Targets(torch.tensor([2, 1]), torch.tensor([last, last]), torch.tensor([7, 5]))
    found = integrated_gradients(model, batch, targets, steps=12)
    assert [len(values) for values in found.values] == [count, count]
    assert all(values.any() for values in found.values)
    gained = found.scores - found.baseline_scores
    assert found.error.abs().max() < 0.02 * gained.abs().max()
    assert (len(found.notes) > 0) == (family == "qwen3_vl")


def test_bad_requests_are_refused(batch: Batch, unchecked: None) -> None:
    targets = answer_targets(batch)
    for options, why in (
        ({"baseline": "noise"}, "baseline='noise'"),
        ({"baseline": torch.zeros(3)}, r"shape \(3,\) for values of width 128"),
        ({"point": "pixel_values", "baseline": torch.zeros(3)}, "pixels have one baseline, zero"),
        ({"at": "pad"}, "has no position"),
        ({"at": 5}, "is its own mean"),
    ):
        with pytest.raises(BadInputError, match=why):
            integrated_gradients(wide(), batch, targets, **options)
    blip = HookedMM(miniature("blip"), check=False)
    with pytest.raises(BadInputError, match=r"no point 'projector.hook_out'"):
        integrated_gradients(blip, blip._batch(miniature_inputs(blip.hf_model)), targets)
