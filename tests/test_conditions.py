"""Conditions against raw hooks that judge by hand; memory that ends with its run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.conditions import Above, Below
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add, Scale
from hooked_mm.knockout import KnockOut
from hooked_mm.runner import Hook
from tests.raw import raw_hook
from tests.test_value_layout import make_batch

PROMPTS = ["what colour is the circle ?", "describe the scene .", "what place is this ? describe the scene ."]
EARLY, LATE = "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"
U = torch.randn(128, generator=torch.Generator().manual_seed(1))
UNIT = U / U.norm()
V = 25 * torch.randn(128, generator=torch.Generator().manual_seed(2))
TEXT = (1, 2)


@pytest.fixture(scope="module")
def batch(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Three prompts of different lengths, padded on the left."""
    return llava.prepare(images[:3], PROMPTS)


def between(values: Tensor) -> float:
    """A threshold in the middle of the widest gap between values."""
    ordered = values.flatten().sort().values
    gap = int(ordered.diff().argmax())
    return float((ordered[gap] + ordered[gap + 1]) / 2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}])
@pytest.mark.parametrize("point", [None, EARLY])
def test_per_position_in_generation_equals_raw_hooks(
    llava: HookedMM, batch: Batch, options: dict, point: str | None
) -> None:
    """At every step and position of its own: there where an earlier point, or the value itself, is high."""
    _, cache = llava.run_with_cache(batch, [EARLY, LATE])
    threshold = between((cache[point or LATE] @ UNIT)[:, -1])
    seen: list[Tensor] = []

    def look(x: Tensor) -> None:
        seen[:] = [x @ UNIT > threshold]

    def push(x: Tensor) -> Tensor:
        where = seen[0] if point else x @ UNIT > threshold
        rows = batch.mask().repeat_interleave(x.shape[0] // 3, 0) if x.shape[1] > 1 else torch.tensor([[True]])
        return torch.where((where & rows)[..., None], x + V, x)

    settings = {"max_new_tokens": 8, "do_sample": False, **options}
    inputs = {key: value for key, value in batch.inputs.items() if key != "position_ids"}
    torch.manual_seed(0)
    with raw_hook(llava.hf_model, EARLY, look), raw_hook(llava.hf_model, LATE, push):
        expected = llava.hf_model.generate(**inputs, **settings)
    torch.manual_seed(0)
    with llava.hooks([*Add(LATE, V).when(Above(U, threshold, point)).specs()]):
        got = llava.generate(batch, **settings)
    assert torch.equal(got.tokens, expected[:, batch.input_ids.shape[1] :])
    torch.manual_seed(0)
    assert not torch.equal(llava.generate(batch, **settings).tokens, got.tokens)


@pytest.mark.parametrize("over", ["any", "mean"])
@pytest.mark.parametrize("point", [None, EARLY, "projector.hook_out"])
def test_a_sample_is_judged_once_by_its_prompt(llava: HookedMM, batch: Batch, over: Any, point: str | None) -> None:
    """Whole samples, for all their generated tokens and beams; the others answer as ever."""
    name = point or LATE
    _, cache = llava.run_with_cache(batch, name)
    rows = [cache.select(name, modality="image", sample=row).values @ UNIT for row in range(3)]
    scores = torch.stack([row.max() if over == "any" else row.mean() for row in rows])
    passing = scores > between(scores)
    assert 0 < int(passing.sum()) < 3
    condition = Above(U, between(scores), point, over=over, at="image")
    for beams in (1, 2):
        plain = llava.generate(batch, 8, num_beams=beams)
        with llava.hooks([*Add(LATE, V, at="generated").specs()]):
            always = llava.generate(batch, 8, num_beams=beams)
        with llava.hooks([*Add(LATE, V, at="generated").when(condition).specs()]):
            got = llava.generate(batch, 8, num_beams=beams)
        assert always.text != plain.text
        assert got.text == [a if hit else b for a, b, hit in zip(always.text, plain.text, passing, strict=True)]


@given(seed=st.integers(0, 99), over=st.sampled_from(["position", "any", "mean"]), cosine=st.booleans())
def test_judgements_against_a_loop(seed: int, over: Any, cosine: bool) -> None:
    """Right-padded samples of 3 and 2 tokens in two beams: the formula position by position, padding never."""
    batch = make_batch([[TEXT] * 3, [TEXT] * 2], left=False)
    value = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
    value[2:] = value[2:3]
    value[:2] = value[:1]
    direction = torch.arange(1.0, 9)
    hook = Hook(LATE, 2, 0, batch)

    def score(x: Tensor) -> float:
        along = float(x.double() @ direction.double() / direction.double().norm())
        return along / float(x.double().norm()) if cosine else along

    for kind, sign in ((Above, 1), (Below, -1)):
        got = kind(direction, 0.1, over=over, cosine=cosine).judge(value, hook)
        for sample, own in enumerate((3, 2)):
            tokens = [value[2 * sample, place] for place in range(own)]
            hits = [sign * score(token) > sign * 0.1 for token in tokens]
            if over == "position":
                assert got[2 * sample].tolist() == got[2 * sample + 1].tolist() == hits + [False] * (3 - own)
            elif over == "any":
                assert bool(got[sample]) == any(hits)
            else:
                assert bool(got[sample]) == (sign * score(torch.stack(tokens).double().mean(0)) > sign * 0.1)


def test_every_run_is_judged_anew(llava: HookedMM, images: list[Image.Image]) -> None:
    """One open `hooks` block, one batch after the other, and back: each answer is that of a block of its own."""
    batches = [llava.prepare(images[row : row + 1], PROMPTS[row]) for row in range(3)]
    scores = torch.stack([(llava.run_with_cache(one, EARLY)[1][EARLY] @ UNIT).max() for one in batches])
    push = Add(LATE, V).when(Above(U, between(scores), EARLY, over="any"))
    expected = []
    for one in batches:
        with llava.hooks([*push.specs()]):
            expected.append(llava.generate(one, 6).text)
    with llava.hooks([*push.specs()]):
        got = [llava.generate(batches[row], 6).text for row in (0, 1, 2, 1, 0)]
    assert got == [expected[row] for row in (0, 1, 2, 1, 0)]
    assert expected != [llava.generate(one, 6).text for one in batches]


def test_all_parts_of_a_composition_are_judged_before_the_first(llava: HookedMM, batch: Batch) -> None:
    """A condition on the intervention's own point sees the value before any part changes it; conditions nest."""
    _, plain = llava.run_with_cache(batch, LATE)
    score, real = plain[LATE] @ UNIT, batch.mask()
    middle = float(score[real].median())
    made = (Scale(LATE, 0.0) + Add(LATE, V)).when(Above(U, middle)).when(Below(U, middle + 5))
    with llava.hooks([*made.specs()]):
        _, cache = llava.run_with_cache(batch, LATE)
    chosen = real & (score > middle) & (score < middle + 5)
    assert torch.equal(cache[LATE], torch.where(chosen[..., None], V, plain[LATE]))
    assert chosen.any()
    assert not chosen[real].all()
    assert repr(made).startswith("(Scale('blocks.2.hook_resid_post', factor=0) + Add(")
    assert repr(made).endswith(f".when(Below(direction=<128 of norm 1>, threshold={middle + 5:.6g}))")


def test_answers_of_another_step_or_batch_are_not_used() -> None:
    """An act whose condition was not judged in this very step of this very run is refused."""
    batch, other = make_batch([[TEXT] * 3]), make_batch([[TEXT] * 3])
    value = torch.ones(1, 3, 128)
    (_, look), (_, act) = Add(LATE, V).when(Above(U, -1e6, EARLY)).specs()
    look(value, Hook(EARLY, 0, 0, batch))
    assert torch.equal(act(value, Hook(LATE, 2, 0, batch)), value + V)
    for hook in (Hook(LATE, 2, 0, other), Hook(LATE, 2, 1, batch)):
        with pytest.raises(BadInputError, match="has not been judged"):
            act(value[:, : 3 - 2 * hook.step], hook)


def test_a_sample_without_a_position_to_look_at_does_not_pass() -> None:
    """No image: neither above nor below anything."""
    batch = make_batch([[TEXT, (2, 0)], [TEXT, TEXT]])
    for over in ("any", "mean"):
        condition = Below(U, 1e6, over=over, at="image")  # type: ignore[arg-type]
        assert condition.judge(torch.ones(2, 2, 128), Hook(EARLY, 0, 0, batch)).tolist() == [True, False]


def test_a_knockout_can_be_conditional() -> None:
    """Queries are narrowed to the samples, or the positions, that pass at an earlier point."""
    batch = make_batch([[TEXT] * 3, [TEXT] * 3])
    stream = torch.zeros(2, 3, 8)
    stream[1, 2, 0] = 5.0
    pattern = torch.full((2, 1, 3, 3), 1 / 3)
    for over, rows in (("any", [[1, 0], [1, 1], [1, 2]]), ("position", [[1, 2]])):
        condition = Above(torch.eye(8)[0], 1.0, EARLY, over=over)  # type: ignore[arg-type]
        (_, look), (names, act) = KnockOut(1, keys=0).when(condition).specs()
        assert names == ["blocks.1.attn.hook_pattern"]
        look(stream, Hook(EARLY, 0, 0, batch))
        got = act(pattern, Hook("blocks.1.attn.hook_pattern", 1, 0, batch))
        assert got is not None
        assert (got[:, 0] != pattern[:, 0]).any(-1).nonzero().tolist() == rows
        assert (got[1, 0, 2] - torch.tensor([0, 0.5, 0.5])).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Above(torch.zeros(3), 1), "direction has length 0"),
        (lambda: Above(U, 1, over="some"), "over='some'; it must be 'position', 'any' or 'mean'"),
        (lambda: Above(U, 1, "blocks.*.hook_resid_post"), "is a pattern; a condition looks at one point"),
        (lambda: Add(EARLY, V).when(Above(U, 1, LATE)), "not been judged when 'blocks.0.hook_resid_post' is reached"),
        (lambda: Add(LATE, V).when(Above(torch.ones(64), 1)), r"can't look at 'blocks.2.hook_resid_post' of shape"),
        (lambda: Scale("blocks.0.attn.hook_z", 0).when(Above(torch.ones(32), 1)), "give the condition a point="),
        (
            lambda: Add(LATE, V).when(Above(U, 1, "projector.hook_out")),
            "not those of 'blocks.2.hook_resid_post', .*judge whole samples instead",
        ),
    ],
)
def test_what_can_not_be_judged_is_refused(
    llava: HookedMM, batch: Batch, make: Callable[[], Any], message: str
) -> None:
    """When made, or in the first run."""
    with pytest.raises(BadInputError, match=message):
        llava.run_with_hooks(batch, [*make().specs()])
