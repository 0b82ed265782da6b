"""Interventions against raw PyTorch hooks that do the same by hand, in a forward pass and token for token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import (
    Add,
    AtPoint,
    Compose,
    Intervention,
    ProjectOut,
    Replace,
    Rotate,
    Scale,
    SetComponent,
)
from hooked_mm.positions import QUESTION, Positions
from hooked_mm.runner import Hook
from tests.raw import raw_hook
from tests.test_value_layout import make_batch

PROMPTS = ["what colour is the circle ?", "describe the scene .", "what ?"]
POINT = "blocks.0.hook_resid_post"
TEXT = (1, 2)


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


U, V, W = rand(128, seed=1), rand(128, seed=2), rand(3, 128, seed=3)
UNIT = U / U.norm()
E2 = (V - (V @ UNIT) * UNIT) / (V - (V @ UNIT) * UNIT).norm()


def turned(x: Tensor, angle: float) -> Tensor:
    """x with its part in the plane of UNIT and E2 turned."""
    a, b = x @ UNIT, x @ E2
    rest = x - a[..., None] * UNIT - b[..., None] * E2
    return (
        rest
        + (a * math.cos(angle) - b * math.sin(angle))[..., None] * UNIT
        + (a * math.sin(angle) + b * math.cos(angle))[..., None] * E2
    )


# A kind of intervention, and what it does to x (rows, positions, 128), written out by hand.
KINDS: dict[str, tuple[Callable[..., AtPoint], Callable[[Tensor], Tensor]]] = {
    "add": (lambda **at: Add(POINT, U, 1.5, **at), lambda x: x + 1.5 * U),
    "relative": (
        lambda **at: Add(POINT, U, 0.5, relative=True, **at),
        lambda x: x + 0.5 * x.norm(dim=-1)[..., None] * UNIT,
    ),
    "keep norm": (
        lambda **at: Add(POINT, U, 1.5, keep_norm=True, **at),
        lambda x: (x + 1.5 * U) * (x.norm(dim=-1) / (x + 1.5 * U).norm(dim=-1))[..., None],
    ),
    "replace": (lambda **at: Replace(POINT, U, **at), lambda x: U.expand_as(x)),
    "zero": (lambda **at: Replace(POINT, 0, **at), lambda x: x * 0),
    "scale": (lambda **at: Scale(POINT, 0.25, **at), lambda x: x * 0.25),
    "project": (
        lambda **at: ProjectOut(POINT, torch.stack([U, V]), **at),
        lambda x: x - (x @ UNIT)[..., None] * UNIT - (x @ E2)[..., None] * E2,
    ),
    "set": (lambda **at: SetComponent(POINT, U, 7, **at), lambda x: x - (x @ UNIT)[..., None] * UNIT + 7 * UNIT),
    "rotate": (lambda **at: Rotate(POINT, U, V, 1.1, **at), lambda x: turned(x, 1.1)),
}


@pytest.fixture(scope="module")
def batch(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Three prompts of different lengths, padded on the left; the second has two pictures, the third none."""
    return llava.prepare([images[0], [images[1], images[2]], None], PROMPTS)


def fake(shape: tuple[int, ...], name: str = POINT, step: int = 0) -> Hook:
    """A hook in a batch of text of this shape, for tensors alone."""
    return Hook(name, 2, step, make_batch([[TEXT] * shape[1]] * shape[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_equals_a_raw_hook(llava: HookedMM, batch: Batch, kind: str) -> None:
    """Everywhere, at image positions, at the question of two samples: logits as with a hand-written hook."""
    make, by_hand = KINDS[kind]
    question = batch.mask(role="question")
    question[1] = False
    rules = {"all": batch.mask(), "image": batch.mask(modality="image"), "question": question}
    for word, mask in rules.items():
        with (
            raw_hook(llava.hf_model, POINT, lambda x, m=mask: torch.where(m[..., None], by_hand(x), x)),
            torch.no_grad(),
        ):
            expected = llava.hf_model(**batch.inputs).logits
        at = QUESTION & Positions(sample=[0, 2]) if word == "question" else word
        logits = llava.run_with_hooks(batch, [*make(at=at).specs()])
        assert logits is not None
        real = batch.mask()
        if kind in ("add", "replace", "zero", "scale"):
            assert torch.equal(logits, expected)
        assert (logits - expected)[real].abs().max() <= 1e-4
        plain = llava.run_with_hooks(batch)
        assert plain is not None
        assert (logits - plain)[real].abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0, "num_return_sequences": 2}])
@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("add", "generated"),
        ("per sample", "question"),
        ("project", "last_prompt"),
        ("per sample", "generated"),
        ("add", "question"),
    ],
)
def test_generation_equals_raw_hooks(llava: HookedMM, batch: Batch, options: dict, kind: str, word: str) -> None:
    """Token for token with left padding: greedy, beams, seeded sampling with two answers per prompt."""
    rows = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    # Behind its first block the small LLaVA has read the question: to change an answer, change it before.
    point = POINT if kind == "project" else "hook_embed"
    push = 400 * W.repeat_interleave(rows, 0)[:, None]
    made: Intervention = Add(point, W, 400, at=word) if kind == "per sample" else KINDS[kind][0](at=word)
    made = Add(point, 40 * U, 5, at=word) if kind == "add" else made
    change = {"add": lambda x: x + 5 * (40 * U), "per sample": lambda x: x + push, "project": KINDS["project"][1]}[kind]
    last = torch.zeros_like(batch.mask())
    last[:, -1] = True
    prompt = {"question": batch.mask(role="question"), "generated": last & ~last, "last_prompt": last}[word]
    prompt = prompt.repeat_interleave(rows, 0)

    def by_hand(x: Tensor) -> Tensor:
        mask = prompt if x.shape[1] > 1 else torch.full(x.shape[:2], word == "generated")
        return torch.where(mask[..., None], change(x), x)

    settings = {"max_new_tokens": 8, "do_sample": False, **options}
    inputs = {key: value for key, value in batch.inputs.items() if key != "position_ids"}
    torch.manual_seed(0)
    with raw_hook(llava.hf_model, point, by_hand):
        expected = llava.hf_model.generate(**inputs, **settings)
    torch.manual_seed(0)
    with llava.hooks([*made.specs()]):
        got = llava.generate(batch, **settings)
    assert torch.equal(got.tokens, expected[:, batch.input_ids.shape[1] :])
    if kind != "project":
        torch.manual_seed(0)
        assert not torch.equal(llava.generate(batch, **settings).tokens, got.tokens)


@pytest.mark.parametrize("beams", [1, 3])
def test_tower_points_in_generation_equal_raw_hooks(llava: HookedMM, images: list[Image.Image], beams: int) -> None:
    """One vector per sample, at the first patches of the images of its sample."""
    batch = llava.prepare([images[0], images[1]], PROMPTS[:2])

    def by_hand(x: Tensor) -> Tensor:
        push = 300 * W[:2].repeat_interleave(x.shape[0] // 2, 0)[:, None]
        return torch.cat([(x + push)[:, :50], x[:, 50:]], dim=1)

    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    inputs = {key: value for key, value in batch.inputs.items() if key != "position_ids"}
    with raw_hook(llava.hf_model, "projector.hook_out", by_hand):
        expected = llava.hf_model.generate(**inputs, **settings)
    with llava.hooks([*Add("projector.hook_out", W[:2], 300, at=range(50)).specs()]):
        got = llava.generate(batch, **settings)
    assert torch.equal(got.tokens, expected[:, batch.input_ids.shape[1] :])
    assert not torch.equal(got.tokens, llava.generate(batch, **settings).tokens)


def test_steered_answers_are_those_of_one_pass(llava: HookedMM, batch: Batch) -> None:
    """What was generated while answers were pushed is the argmax of one pass over prompt and answer with the push."""
    push = Add(POINT, U, 6, at="answer") + ProjectOut("blocks.4.hook_mlp_out", V, at="answer")
    with llava.hooks([*push.specs()]):
        out = llava.generate(batch, 12)
        assert out.batch is not None
        logits, _ = llava.run_with_cache(out.batch, "hook_logits")
    assert logits is not None
    rows, positions = out.batch.mask(role="answer").nonzero(as_tuple=True)
    assert torch.equal(logits[rows, positions - 1].argmax(-1), out.batch.input_ids[rows, positions])
    assert out.text != llava.generate(batch, 12).text


def test_positions_not_chosen_and_other_heads_stay_bit_for_bit(llava: HookedMM, batch: Batch) -> None:
    """At a point with heads: one head's image positions change, nothing else."""
    name = "blocks.1.attn.hook_z"
    _, before = llava.run_with_cache(batch, name)
    with llava.hooks([*SetComponent(name, torch.eye(32)[5], 9.0, at="image", heads=-2).specs()]):
        _, after = llava.run_with_cache(batch, name)
    changed = (before[name] != after[name]).nonzero()
    assert (changed[:, 2:] == torch.tensor([2, 5])).all()
    image = batch.mask(modality="image")
    assert torch.equal(changed[:, :2], image.nonzero())
    assert (after[name][image][:, 2, 5] == 9).all()


@given(
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    chosen=st.lists(st.integers(0, 4), min_size=1, unique=True),
    seed=st.integers(0, 99),
)
def test_dtypes_and_untouched_positions(kind: str, dtype: torch.dtype, chosen: list[int], seed: int) -> None:
    """The value's dtype is kept, the result is the formula within the dtype's resolution, the rest is bit-equal."""
    make, by_hand = KINDS[kind]
    value = rand(2, 5, 128, seed=seed).to(dtype)
    got = make(at=chosen).apply(value, fake((2, 5)))
    assert got.dtype == dtype
    others = [index for index in range(5) if index not in chosen]
    assert torch.equal(got[:, others], value[:, others])
    expected = by_hand(value.float()).double()[:, chosen]
    size = max(expected.abs().max(), value.double().abs().max())
    assert (got.double()[:, chosen] - expected).abs().max() <= 2 * max(torch.finfo(dtype).eps, 1e-6) * size


@given(seed=st.integers(0, 99), count=st.integers(1, 3), angle=st.floats(-7, 7))
def test_what_the_kinds_promise(seed: int, count: int, angle: float) -> None:
    """Projecting out twice is once and leaves nothing along the directions; turning keeps lengths and is undone."""
    value, directions = rand(2, 5, 16, seed=seed).double(), rand(2, count, 16, seed=seed + 1000).double()
    hook = fake((2, 5))
    for given_directions in (directions[0], directions):
        out = ProjectOut(POINT, given_directions)
        once = out.apply(value, hook)
        assert torch.allclose(out.apply(once, hook), once, atol=1e-10)
        along = torch.einsum("bpd,bkd->bpk", once, directions)
        assert along[:1].abs().max() < 1e-10
        assert along.abs().max() < 1e-10 or given_directions.ndim == 2
    first, second = rand(2, 16, seed=seed + 2000).double()
    there = Rotate(POINT, first, second, angle).apply(value, hook)
    assert torch.allclose(there.norm(dim=-1), value.norm(dim=-1), atol=1e-10)
    assert torch.allclose(Rotate(POINT, first, second, -angle).apply(there, hook), value, atol=1e-10)
    normal = ProjectOut(POINT, torch.stack([first, second]))
    assert torch.allclose(normal.apply(there, hook), normal.apply(value, hook), atol=1e-10)
    aimed = Rotate(POINT, first, second, torch.tensor([angle, 0.5]), target=True).apply(value, hook)
    assert torch.allclose(aimed.norm(dim=-1), value.norm(dim=-1), atol=1e-10)
    e1 = first / first.norm()
    e2 = second - (second @ e1) * e1
    found = torch.atan2(aimed @ e2 / e2.norm(), aimed @ e1)
    aim = torch.tensor([[angle], [0.5]]).double().sub(found)
    assert (1 - aim.cos()).abs().max() < 1e-6
    level = SetComponent(POINT, directions[:, 0], torch.tensor([2.0, -3.0])).apply(value, hook)
    components = (level * directions[:, :1]).sum(-1) / directions[:, :1].norm(dim=-1)
    assert torch.allclose(components, torch.tensor([[2.0], [-3.0]]).double().expand(2, 5), atol=1e-10)


def test_composition_runs_in_order(llava: HookedMM, batch: Batch) -> None:
    """a + b at one point is b after a, nested compositions are flat, and b + a is something else."""
    add, scale = Add(POINT, U, 2.0), Scale(POINT, 3)
    both = add + scale + add
    assert isinstance(both, Compose)
    assert both.parts == (add, scale, add)
    _, plain = llava.run_with_cache(batch, POINT)
    with llava.hooks([*both.specs()]):
        _, cache = llava.run_with_cache(batch, POINT)
    real = batch.mask()
    assert torch.equal(cache[POINT][real], ((plain[POINT] + 2 * U) * 3 + 2 * U)[real])
    assert torch.equal(cache[POINT][~real], plain[POINT][~real])
    with llava.hooks([*(scale + add).specs()]):
        _, other = llava.run_with_cache(batch, POINT)
    assert torch.equal(other[POINT][real], (plain[POINT] * 3 + 2 * U)[real])


def test_padding_is_touched_only_when_asked(llava: HookedMM, batch: Batch) -> None:
    """`pad` reaches padding, `all` does not, on either side."""
    hook, value = Hook(POINT, 2, 0, batch), rand(*batch.modality.shape, 128)
    for at, mask in (("all", batch.mask()), ("pad", ~batch.mask())):
        changed = (Add(POINT, U, at=at).apply(value, hook) != value).any(-1)
        assert torch.equal(changed, mask)
        assert mask.any()
        assert not mask.all()


def test_packed_towers() -> None:
    """(patches, d): the last patch of each image, and vectors by the image's sample."""
    image, text = (2, 0), (1, 2)
    batch = make_batch([[image, text], [image, text]], image_grid_thw=torch.tensor([[1, 2, 2], [1, 1, 2]]))
    hook, value = Hook("vision.blocks.0.hook_resid_post", 0, 0, batch), rand(6, 128)
    got = Add("vision.*", W[:2], at=-1).apply(value, hook)
    expected = value.clone()
    expected[3] += W[0]
    expected[5] += W[1]
    assert torch.equal(got, expected)


def test_gradients_reach_the_vector(llava: HookedMM, batch: Batch) -> None:
    """A steering vector can be learnt: the gradient through `Add` is the number of positions times alpha."""
    vector = torch.zeros(128, requires_grad=True)
    value = rand(*batch.modality.shape, 128)
    Add(POINT, vector, 2.0, at="image").apply(value, Hook(POINT, 2, 0, batch)).sum().backward()
    assert vector.grad is not None
    assert (vector.grad == 2.0 * int(batch.mask(modality="image").sum())).all()


def test_interventions_are_frozen_and_print_on_one_line() -> None:
    """No field can be set; compositions and conditions show their parts."""
    add = Add(POINT, U, 2.0, at="image")
    with pytest.raises(FrozenInstanceError):
        add.alpha = 3.0  # type: ignore[misc]
    text = repr(add + Rotate(POINT, U, V, 0.5))
    assert text.startswith("Add('blocks.0.hook_resid_post', at=Positions(modality='image'), vector=<128 of norm ")
    assert " + Rotate('blocks.0.hook_resid_post', first=<128 of norm " in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Add(POINT, rand(64)),
            r"vector has length 64, but the vectors at 'blocks.0.hook_resid_post' have length 128",
        ),
        (lambda: Add(POINT, rand(2, 128)), "vector of shape .* is one per sample for 2, but the batch has 3"),
        (lambda: Scale(POINT, 2, heads=1), "heads=1 was given, but 'blocks.0.hook_resid_post' has no heads"),
        (
            lambda: Scale("blocks.0.attn.hook_z", 2, heads=4),
            "head 4 was asked for, but 'blocks.0.attn.hook_z' has 4 heads",
        ),
        (lambda: Scale("projector.hook_out", 2, at="question"), "role='question'.*it holds image patches"),
        (lambda: Scale(POINT, 2, at=46), "sample 2: .*there are only 7 tokens"),
        (lambda: Rotate(POINT, U, 2 * U, 1.0), "first and second are parallel"),
        (lambda: Rotate(POINT, U, rand(64), 1.0), "first has length 128, second 64"),
        (lambda: Add(POINT, [math.inf] * 128), "vector holds NaN or infinite"),
        (lambda: SetComponent(POINT, torch.zeros(128), 1), "direction has length 0"),
        (lambda: Scale(POINT, 2, heads="first"), "heads='first'; it must be a whole number"),
    ],
)
def test_what_does_not_fit_is_refused(llava: HookedMM, batch: Batch, make: Callable[[], Any], message: str) -> None:
    """When made, or at the first activation it does not fit."""
    with pytest.raises(BadInputError, match=message):
        llava.run_with_hooks(batch, [*make().specs()])
    with pytest.raises(TypeError):
        Scale(POINT, 2) + 1  # type: ignore[operator]
