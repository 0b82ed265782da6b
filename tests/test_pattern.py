"""Rows of a pattern, against loops in float64 that know one query at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hooked_mm.pattern import block_mask, causal, eager_attention, pick_rows, row_patterns, rows_of


def rand(*shape: int, seed: int) -> Tensor:
    """Seeded normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row_by_hand(
    query: Tensor, keys: Tensor, seen: list[bool], scaling: float, cap: Any, bias: Any, sink: Any
) -> Tensor:
    """One row of one head: softmax over the keys that are seen, with Python's numbers."""
    scores = []
    for number, key in enumerate(keys):
        score = math.fsum((query * key).tolist()) * scaling
        score = cap * math.tanh(score / cap) if cap else score
        score += 0.0 if bias is None else float(bias[number])
        scores.append(score if seen[number] else -math.inf)
    extra = [] if sink is None else [float(sink)]
    top = max([*scores, *extra])
    parts = [math.exp(score - top) for score in scores]
    total = math.fsum([*parts, *(math.exp(item - top) for item in extra)])
    return torch.tensor([part / total for part in parts], dtype=torch.float64)


@settings(max_examples=60)
@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (3, 2, 3, 5, 6))),
    kind=st.sampled_from(["none", "causal", "boolean", "additive", "shared row", "packed"]),
    cap=st.sampled_from([None, 2.0]),
    more=st.booleans(),
    some=st.booleans(),
    seed=st.integers(0, 999),
)
def test_rows_are_those_of_the_equation(
    sizes: tuple[int, int, int, int, int], kind: str, cap: Any, more: bool, some: bool, seed: int
) -> None:
    """Any rows and heads, grouped keys, every kind of mask, soft-cap, sinks and position bias."""
    b, kv, repeats, q, k = sizes
    heads = kv * repeats
    k = q if kind in ("causal", "packed") else k
    query, key = rand(b, heads, q, 4, seed=seed), rand(b, kv, k, 4, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, q, (b, 3), generator=generator)
    chosen = torch.randperm(heads, generator=generator)[: max(1, heads // 2)] if some else None
    may = torch.ones(b, 1, q, k, dtype=torch.bool)
    if kind in ("boolean", "additive", "shared row"):
        may = rand(b, 1, 1 if kind == "shared row" else q, k, seed=seed + 2) > 0
        may[..., 0] = True
    mask, bounds = None, None
    if kind in ("boolean", "shared row"):
        mask = may
    elif kind == "additive":
        mask = torch.zeros(may.shape, dtype=torch.float64).masked_fill(~may, -torch.inf)
    elif kind == "causal" and q > 1:
        may = may.tril()
    elif kind == "packed":
        bounds = torch.tensor([0, (q + 1) // 2, q])
        may = block_mask(bounds, q, query.device).expand(b, 1, q, q)
    may = may.expand(b, 1, q, k)
    bias, sinks = (rand(1, heads, q, k, seed=seed + 3), rand(heads, seed=seed + 4)) if more else (None, None)
    options = {"scaling": 0.7, "softcap": cap, "s_aux": sinks, "position_bias": bias}
    module = SimpleNamespace(is_causal=kind == "causal")
    got = row_patterns(module, query, key, mask, bounds, options, rows, chosen)
    numbers = list(range(heads)) if chosen is None else chosen.tolist()
    assert got.shape == (b, len(numbers), 3, k)
    for sample in range(b):
        for place, head in enumerate(numbers):
            for at, row in enumerate(rows[sample].tolist()):
                expected = row_by_hand(
                    query[sample, head, row],
                    key[sample, head // repeats],
                    may[sample, 0, row].tolist(),
                    0.7,
                    cap,
                    None if bias is None else bias[0, head, row],
                    None if sinks is None else sinks[head],
                )
                assert torch.allclose(got[sample, place, at], expected, atol=1e-12)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(value, Tensor):
                # What a view lies on counts, not what it shows.
                self.numbers = max(self.numbers, value.untyped_storage().nbytes() // value.element_size())
        return found


@pytest.mark.parametrize("masked", [False, True])
def test_rows_never_need_the_whole_pattern_nor_copies_of_shared_keys(masked: bool) -> None:
    """Of 3 rows at 200 positions, no operation makes more numbers than queries, or rows x keys; the whole makes all."""
    query, key = rand(2, 8, 200, 4, seed=0), rand(2, 2, 200, 4, seed=1)
    mask = torch.zeros(2, 1, 200, 200, dtype=torch.float64) if masked else None
    given_storage = 0 if mask is None else mask.numel()
    rows = torch.tensor([[1, 5, 199], [0, 0, 7]])
    module = SimpleNamespace(is_causal=True)
    with _Largest() as seen:
        row_patterns(module, query, key, mask, None, {}, rows)
    assert seen.numbers <= max(query.numel(), 2 * 8 * 3 * 200, given_storage)
    with _Largest() as whole:
        eager_attention(query, key.repeat_interleave(4, dim=1), mask, 0.5)
    assert whole.numbers == 2 * 8 * 200 * 200


def test_what_is_broadcast_stands_for_all() -> None:
    """One row, head or sample of a mask stands for every one; rows of a whole pattern are copies of their own."""
    whole = rand(2, 3, 4, 5, seed=0)
    rows, heads = torch.tensor([[3, 0], [1, 1]]), torch.tensor([2])
    got = pick_rows(whole, rows, heads)
    assert torch.equal(got[0, 0], whole[0, 2, [3, 0]])
    assert torch.equal(got[1, 0], whole[1, 2, [1, 1]])
    assert torch.equal(pick_rows(whole[:1, :1, :1], rows, heads), whole[:1, :1, :1].expand(2, 1, 2, 5))
    rows_there = rows_of(whole)
    assert rows_there.shape == (2, 3, 4, 5)
    taken = rows_there.take(rows, None)
    assert taken.untyped_storage().nbytes() == taken.numel() * 8


def test_who_says_whether_attention_is_causal() -> None:
    """The call before the module; a module that says nothing is."""
    assert causal(SimpleNamespace(), {})
    assert not causal(SimpleNamespace(is_causal=False), {})
    assert causal(SimpleNamespace(is_causal=False), {"is_causal": True})
