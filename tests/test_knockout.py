"""Cut attention against a softmax in float64 with -inf scores; rules for queries and keys in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.knockout import KnockOut, cut
from hooked_mm.positions import ALL, Positions
from hooked_mm.runner import Hook

NAME = "blocks.1.attn.hook_pattern"


def scores(rows: int, queries: int, keys: int, seed: int = 0) -> torch.Tensor:
    """Attention scores (rows, 2 heads, queries, keys), causal: the last query sees all keys."""
    made = torch.randn(rows, 2, queries, keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return made.masked_fill(later, -torch.inf)


@given(
    seed=st.integers(0, 99),
    queries=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_a_cut_is_minus_infinity_before_the_softmax(seed: int, queries: int, share: float, dtype: torch.dtype) -> None:
    """Entries, row sums, untouched rows bit for bit; rows with nothing left are zero."""
    raw = scores(2, queries, 6, seed)
    removed = torch.rand(raw.shape, generator=torch.Generator().manual_seed(seed)) < share
    pattern = raw.softmax(-1).to(dtype)
    expected = raw.masked_fill(removed, -torch.inf).softmax(-1).nan_to_num(0.0)
    got = cut(pattern, removed)
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max() <= 4 * max(torch.finfo(dtype).eps, 1e-7)
    assert not got[removed].any()
    untouched = ~(removed & raw.isfinite()).any(-1)
    assert torch.equal(got[untouched], pattern[untouched])


@pytest.fixture(scope="module")
def batch(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Two prompts of different lengths, padded on the left."""
    return llava.prepare(images[:2], ["what place is this ?", "what ?"])


@given(
    step=st.integers(0, 3),
    beams=st.integers(1, 2),
    heads=st.sampled_from([None, 1, [0, -1]]),
    queries=st.sampled_from(["all", "last_prompt", "generated", "answer"]),
    keys=st.sampled_from(["image", "question", "generated"]),
)
def test_rules_in_every_step(
    llava: HookedMM, batch: Batch, step: int, beams: int, heads: Any, queries: str, keys: str
) -> None:
    """Prompt positions and then generated ones as keys, the newest token as query; only the chosen heads."""
    given_positions = batch.modality.shape[1]
    total = given_positions + step
    raw = scores(2 * beams, total if step == 0 else 1, total)
    prompt = {"image": batch.mask(modality="image"), "question": batch.mask(role="question")}
    removed = torch.zeros(raw.shape, dtype=torch.bool)
    for row in range(2 * beams):
        key = torch.zeros(total, dtype=torch.bool)
        if keys == "generated":
            key[given_positions:] = True
        else:
            key[:given_positions] = prompt[keys][row // beams]
        for head in range(2) if heads is None else (1,) if heads == 1 else (0, 1):
            for query in range(raw.shape[2]):
                own = {
                    "all": step > 0 or bool(batch.mask()[row // beams, query]),
                    "last_prompt": step == 0 and query == given_positions - 1,
                    "generated": step > 0,
                    "answer": step > 0,
                }[queries]
                removed[row, head, query] = key & own
    got = KnockOut(1, queries, keys, heads).apply(raw.softmax(-1), Hook(NAME, 1, step, batch))
    expected = raw.masked_fill(removed, -torch.inf).softmax(-1).nan_to_num(0.0)
    assert (got - expected).abs().max() < 1e-12


@given(step=st.integers(0, 2))
def test_a_position_may_go_on_reading_itself(batch: Batch, step: int) -> None:
    """All are cut from all: in every step a query reads its own key and nothing else, the newest the newest."""
    length, count = batch.length + step, 1 if step else batch.length
    pattern = scores(2, count, length).softmax(-1)
    every = ALL | Positions(modality="pad")
    got = KnockOut(1, every, every, spare_self=True).apply(pattern, Hook(NAME, 1, step, batch))
    itself = torch.eye(length, dtype=torch.float64)[length - count :]
    assert torch.equal(got, itself.expand_as(got))
    assert not KnockOut(1, every, every).apply(pattern, Hook(NAME, 1, step, batch)).any()


def masked_logits(llava: HookedMM, batch: Batch, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Logits of the bare model with a mask (batch, 1, q, k) of our own: causal, no padding, and not query to key."""
    real = batch.mask()
    count = real.shape[1]
    allowed = torch.ones(count, count, dtype=torch.bool).tril() & real[:, None, :]
    # A padded query sees itself, as a row without any key is no softmax.
    allowed = allowed & ~(queries[:, :, None] & keys[:, None, :]) | torch.eye(count, dtype=torch.bool)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
    with torch.no_grad():
        return llava.hf_model(**{**batch.inputs, "attention_mask": mask}).logits


def test_a_run_equals_the_bare_model_with_a_mask(llava: HookedMM, batch: Batch) -> None:
    """The answer's position cut from the image in every layer: logits as with minus infinity in the mask."""
    image, last = batch.mask(modality="image"), torch.zeros_like(batch.mask())
    last[:, -1] = True
    plain, expected = masked_logits(llava, batch, last & ~last, image), masked_logits(llava, batch, last, image)
    logits = llava.run_with_hooks(batch, [*KnockOut(None, "last_prompt", "image").specs()])
    assert logits is not None
    assert (logits - expected)[batch.mask()].abs().max() < 1e-4
    assert (plain - expected)[:, -1].abs().max() > 1e-2


def test_which_points_it_works_at(llava: HookedMM, batch: Batch) -> None:
    """One layer, several, all, or the tower's; printed on one line."""
    assert [names for names, _ in KnockOut(3).specs()] == [["blocks.3.attn.hook_pattern"]]
    assert [names for names, _ in KnockOut(range(2)).specs()] == [["blocks.0.attn.hook_pattern", NAME]]
    assert [names for names, _ in KnockOut(tower=True).specs()] == [["vision.blocks.*.attn.hook_pattern"]]
    pattern = scores(2, 37, 37).softmax(-1)
    got = KnockOut(0, keys=0, tower=True).apply(pattern, Hook("vision." + NAME, 1, 0, batch))
    assert not got[..., 0].any()
    assert repr(KnockOut([0, 2], "last_prompt", "image", heads=1)) == (
        "KnockOut(layers=(0, 2), queries=Positions(last_prompt=True), keys=Positions(modality='image'), heads=1)"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KnockOut(-1), "layers=-1; they are counted from 0"),
        (lambda: KnockOut("all"), "layers='all'; it must be a whole number"),
        (lambda: KnockOut(1, heads=2), f"head 2 was asked for, but '{NAME}' has 2 heads"),
        (lambda: KnockOut(1, keys="generatd"), "no positions are called 'generatd'; nearest: generated"),
    ],
)
def test_what_does_not_exist_is_refused(batch: Batch, make: Callable[[], KnockOut], message: str) -> None:
    """Layers, heads and rules; and a pattern with more keys than there are positions."""
    size = batch.modality.shape[1]
    with pytest.raises(BadInputError, match=message):
        make().apply(scores(2, size, size), Hook(NAME, 1, 0, batch))
    with pytest.raises(BadInputError, match=f"has {size + 9} positions at step 1, but the batch has {size}"):
        KnockOut(1).apply(scores(2, 1, size + 9), Hook(NAME, 1, 1, batch))
