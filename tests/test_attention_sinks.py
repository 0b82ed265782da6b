"""Attention sinks and budgets: planted ones are found, sums are those of loops in float64, chunks change nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from analyses.attention_sinks import (
    KEYS,
    QUERIES,
    Ledger,
    attention_ledgers,
    first_states,
    heads_with_a_sink,
    loudness,
    query_groups,
    sink_dimensions,
    sink_strength,
    sinks,
    strengths,
    tau_of,
)
from analyses.key_groups import key_groups
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from tests.processors import processor
from tests.tiny import tiny

TEXTS = ["what colour is the star ?", "star ?"]


def prepared(model: HookedMM, images: list[Image.Image], side: str = "left") -> Batch:
    """Two samples of different lengths, with answers."""
    return model.prepare(images[:2], TEXTS, answers=["red", "blue star"], padding_side=side)


def by_hand(batch: Batch, pattern: Tensor) -> tuple[Tensor, Tensor]:
    """alpha (b, heads, k) and budget (b, heads, queries, keys) of a whole causal pattern, query by query."""
    keys, kinds = key_groups(batch, pattern.shape[-1], first=True), query_groups(batch)
    b, heads, length, _ = pattern.shape
    alpha = torch.zeros(b, heads, length, dtype=torch.float64)
    budget = torch.full((b, heads, len(QUERIES), len(KEYS)), math.nan, dtype=torch.float64)
    for n in range(b):
        there = [p for p in range(length) if int(batch.modality[n, p])]
        for h in range(heads):
            for k in there:
                given_ = [float(pattern[n, h, q, k]) for q in there if q >= k]
                alpha[n, h, k] = math.fsum(given_) / len(given_)
            for i, query in enumerate(QUERIES):
                rows = [p for p in there if bool(kinds[query][n, p])]
                for j, key in enumerate(KEYS):
                    columns = [p for p in there if bool(keys[key][n, p])]
                    if rows:
                        spent = math.fsum(float(pattern[n, h, q, k]) for q in rows for k in columns)
                        budget[n, h, i, j] = spent / len(rows)
    return alpha, budget


@pytest.mark.parametrize(("side", "chunk"), [("left", 7), ("right", 64)])
def test_sums_are_those_of_loops_in_float64(llava: HookedMM, images: list[Image.Image], side: str, chunk: int) -> None:
    """What keys receive and what kinds of queries spend, of two layers, under padding, in chunks or not."""
    batch = prepared(llava, images, side)
    found = attention_ledgers(llava, batch, [0, 4], chunk=chunk)
    _, cache = llava.run_with_cache(batch, "blocks.*.attn.hook_pattern")
    for layer, ledger in found.items():
        alpha, budget = by_hand(batch, cache[f"blocks.{layer}.attn.hook_pattern"].double())
        assert torch.allclose(ledger.alpha(), alpha, atol=1e-5)
        assert torch.allclose(ledger.budget(), budget, atol=1e-5, equal_nan=True)
        # Everything is spent, nothing on padding; where a sample has no answer, nobody can spend on one.
        assert torch.allclose(ledger.budget().sum(-1), torch.ones(2, 4, 4, dtype=torch.float64), atol=1e-5)


def test_a_planted_sink_is_found_and_takes_its_share(llava: HookedMM, images: list[Image.Image]) -> None:
    """Head 2 of layer 3 gives .9 of every later row to one image token, by a hook on the pattern."""
    batch = prepared(llava, images)
    image = key_groups(batch, batch.length)["image"]
    target = int(image[0].nonzero()[10])
    rows = torch.arange(batch.length)

    def plant(pattern: Tensor, hook: Any) -> Tensor:
        changed = pattern.clone()
        changed[:, 2, rows > target] *= 0.1
        changed[:, 2, rows > target, target] += 0.9
        return changed

    plain = attention_ledgers(llava, batch, [3])[3]
    with llava.hooks([("blocks.3.attn.hook_pattern", plant)]):
        ledger = attention_ledgers(llava, batch, [3], chunk=16)[3]
    before, after = sinks(plain.alpha(), plain.seen), sinks(ledger.alpha(), ledger.seen)
    assert not before[:, 2, target].any()
    assert after[:, 2, target].all()
    assert torch.equal(after[:, [0, 1, 3]], before[:, [0, 1, 3]])
    rate = heads_with_a_sink(after, ledger.keys["image"])
    assert (rate[:, 2] == 1).all()
    spent = ledger.budget()[:, 2, :, KEYS.index("image")]
    was = plain.budget()[:, 2, :, KEYS.index("image")]
    for query in ("question", "answer"):
        place = QUERIES.index(query)
        assert torch.allclose(spent[:, place], 0.9 + 0.1 * was[:, place], atol=1e-5)


def test_a_key_that_few_queries_see_is_no_sink() -> None:
    """The last position sees itself, and so receives all that the queries that see it give."""
    pattern = torch.eye(12).expand(1, 1, 12, 12)
    groups = {"image": torch.ones(1, 12, dtype=torch.bool)}
    ledger = Ledger(groups, groups, torch.ones(1, 12, dtype=torch.bool))
    ledger.add(pattern, torch.arange(12)[None])
    assert ledger.seen[0].tolist() == list(range(12, 0, -1))
    assert float(ledger.alpha()[0, 0, 11]) == 1
    found = sinks(ledger.alpha(), ledger.seen)
    assert not found.any()
    assert sinks(ledger.alpha(), ledger.seen, least=1)[0, 0].nonzero().flatten().tolist() == [9, 10, 11]
    assert heads_with_a_sink(found, torch.zeros(1, 12, dtype=torch.bool)).isnan().all()
    for wrong in ({"epsilon": 0.0}, {"epsilon": 1.0}, {"least": 0}):
        with pytest.raises(BadInputError, match="give a share between"):
            sinks(ledger.alpha(), ledger.seen, **wrong)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 1000), st.booleans())
def test_chunks_and_their_order_do_not_matter(heads: int, length: int, seed: int, causal: bool) -> None:
    """A pattern row by row, in any order, gives what it gives as a whole; uniform attention has no sink."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, heads, length, length, generator=generator)
    if causal:
        scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    pattern = scores.softmax(-1)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, 0] = length == 1
    groups = {"image": valid}
    whole, parts = (Ledger(groups, groups, valid, causal) for _ in range(2))
    rows = torch.arange(length).expand(2, -1)
    whole.add(pattern, rows)
    for row in torch.randperm(length, generator=generator).tolist():
        parts.add(pattern[:, :, [row]], rows[:, [row]])
    assert torch.allclose(whole.alpha(), parts.alpha(), atol=1e-12)
    assert torch.allclose(whole.budget(), parts.budget(), atol=1e-12)
    assert torch.equal(whole.seen, parts.seen)


def test_who_says_the_answer(llava: HookedMM, images: list[Image.Image]) -> None:
    """The rows that predict it, not its tokens' own; without an answer the row that would predict its first."""
    for side in ("left", "right"):
        batch = prepared(llava, images, side)
        groups = query_groups(batch)
        assert (torch.stack(list(groups.values())).sum(0) <= 1).all()
        for sample in range(2):
            answer = (batch.role[sample] == 3).nonzero()[:, 0]
            assert groups["answer"][sample].nonzero()[:, 0].tolist() == (answer - 1).tolist()
        bare = llava.prepare(images[:2], TEXTS, padding_side=side)
        saying = query_groups(bare)["answer"]
        assert saying.nonzero()[:, 1].tolist() == bare.last_prompt().tolist()
    with pytest.raises(BadInputError, match="roles are unknown"):
        query_groups(llava._batch(batch.inputs))


def test_massive_activations_are_found_by_the_first_position(llava: HookedMM, images: list[Image.Image]) -> None:
    """Planted in two dimensions of the first position and of one image token, in the embeddings: exactly these."""
    batch = prepared(llava, images)
    first = (batch.modality != 0).long().argmax(1)
    target = int(key_groups(batch, batch.length)["image"][0].nonzero()[20])

    def plant(value: Tensor, hook: Any) -> Tensor:
        changed = value.clone()
        for place in (first, torch.tensor([target, target])):
            changed[torch.arange(2), place, 7] = 400.0
            changed[torch.arange(2), place, 90] = -380.0
        return changed

    tau = tau_of(llava.cfg.d_model)
    assert tau == pytest.approx(0.625 * math.sqrt(128))
    assert tau_of(4096) == tau_of(1024) == 20
    assert first_states(llava, batch, [0, 2])[2].shape == (2, 128)
    with llava.hooks([("blocks.0.hook_resid_pre", plant)]):
        states = first_states(llava, batch, [0])
        dimensions = sink_dimensions(states[0], tau)
        assert dimensions == [7, 90]
        phi = strengths(llava, batch, dimensions, [0])[0]
    assert torch.equal((phi >= tau).nonzero()[:, 1].reshape(2, 2), torch.stack([first, torch.tensor([target] * 2)], 1))
    assert not (strengths(llava, batch, [], [0])[0]).any()


def test_loudness_is_a_share_of_the_root_mean_square() -> None:
    """By hand in float64; at most the root of the width; zero states have none; tau beyond that is refused."""
    state = torch.tensor([[3.0, -4.0, 0.0, 0.0]], dtype=torch.float64)
    assert loudness(state)[0].tolist() == pytest.approx([3 / 2.5, 4 / 2.5, 0, 0])
    assert float(sink_strength(state, [0, 2])) == pytest.approx(1.2)
    assert not loudness(torch.zeros(2, 4)).any()
    spike = torch.zeros(1, 16)
    spike[0, 3] = -5
    assert float(loudness(spike).max()) == pytest.approx(4)
    for tau in (0.0, 2.1):
        with pytest.raises(BadInputError, match="no value is more than 2 times"):
            sink_dimensions(state, tau)


def test_cross_attention_has_a_budget_too(images: list[Image.Image]) -> None:
    """Every query sees every key of the tower; all is spent on the picture."""
    model = HookedMM(tiny("mllama"), processor("mllama"), check=False)
    batch = model.prepare(images[:2], "what is this ?", answers=["red", "blue"])
    for ledger in attention_ledgers(model, batch, part="xattn").values():
        valid = (batch.modality != 0).sum(1)
        assert torch.equal(ledger.seen, valid[:, None].expand_as(ledger.seen))
        spent = ledger.budget()[:, :, QUERIES.index("answer")]
        assert torch.allclose(spent[..., 0] + spent[..., 1], torch.ones(2, spent.shape[1]).double(), atol=1e-5)
