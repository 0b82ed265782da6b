"""Moments against numpy's covariance on all rows at once, however they are cut, weighted, grouped or far from 0."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analyses import moments as module
from analyses.moments import (
    Moments,
    PairMoments,
    Running,
    combine,
    grouped_pair_moments,
    moments,
    pair_moments,
)
from hooked_mm.errors import BadInputError
from tests.geometry import in_processes


def drawn(n: int, d: int = 5, e: int = 3, seed: int = 0, far: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pairs of correlated rows."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=random) * torch.arange(1, d + 1) + far
    return x, x[:, :e] ** 2 / (1 + abs(far)) + torch.randn(n, e, dtype=torch.float64, generator=random) - far


def agree(found: PairMoments, x: Tensor, y: Tensor, times: Tensor | None = None) -> None:
    """With numpy's weighted covariance of x and y together."""
    weights = np.ones(len(x), int) if times is None else times.numpy()
    both = np.concatenate([x.double().numpy(), y.double().numpy()], 1)
    mean = np.average(both, axis=0, weights=weights)
    scatter = np.cov(both.T, fweights=weights, ddof=0) * weights.sum()
    d, size = x.shape[1], np.abs(scatter).max()
    assert found.n == weights.sum()
    np.testing.assert_allclose(torch.cat([found.x.mean, found.mean_y]).numpy(), mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.x.scatter.numpy(), scatter[:d, :d], atol=1e-11 * size)
    np.testing.assert_allclose(found.cross.numpy(), scatter[:d, d:], atol=1e-11 * size)
    assert float(found.spread_y) == pytest.approx(np.trace(scatter[d:, d:]), rel=1e-11)
    assert torch.allclose(found.x.scatter, found.x.scatter.T, rtol=1e-14)


@given(
    n=st.integers(2, 60), d=st.integers(1, 7), cuts=st.lists(st.integers(0, 60), max_size=4), seed=st.integers(0, 99)
)
def test_any_cut_of_the_rows_gives_the_same(n: int, d: int, cuts: list[int], seed: int) -> None:
    """Chunk by chunk, merged with `+` or at once; empty parts change nothing."""
    x, y = drawn(n, d, min(d, 3), seed)
    ends = sorted({0, n, *(min(cut, n) for cut in cuts)})
    running = Running(d, y.shape[1])
    parts = [pair_moments(x[:0], y[:0])]
    for start, stop in pairwise(ends):
        running.add(x[start:stop], y[start:stop])
        parts.append(pair_moments(x[start:stop], y[start:stop]))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    for found in (running.pair_moments(), whole, combine(parts), pair_moments(x, y)):
        agree(found, x, y)
    alone: Moments = moments(x) + moments(x[:0])
    assert torch.allclose(alone.scatter, whole.x.scatter, atol=1e-10)


def test_wide_rows_fill_every_block_of_the_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only blocks of the upper triangle are computed: with several of them, and several chunks, all is there."""
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 7 * 150)
    x, y = drawn(40, 150, 3)
    agree(pair_moments(x, y), x, y)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """At 1e6 standard deviations a difference of raw sums keeps four digits; these keep ten (numpy is centred too)."""
    x, y = drawn(500, far=1e6)
    found = pair_moments(x[:50], y[:50]) + pair_moments(x[50:], y[50:])
    exact = (x - x.mean(0)).T @ (x - x.mean(0))
    assert float((found.x.scatter - exact).abs().max() / exact.abs().max()) < 1e-10
    raw = x.T @ x - len(x) * torch.outer(x.mean(0), x.mean(0))
    assert float((raw - exact).abs().max() / exact.abs().max()) > 1e-6


def test_groups_make_folds_and_a_bootstrap_without_another_pass() -> None:
    """Any weighting of groups is what the weighted rows themselves give, the main contribution's too."""
    x, _ = drawn(90, 4)
    y = x @ torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 1
    group = torch.arange(90) % 4
    chunks = ((x[start : start + 13], y[start : start + 13], group[start : start + 13]) for start in range(0, 90, 13))
    groups = grouped_pair_moments(chunks, 4, 4, 4)
    for times in (torch.tensor([1, 1, 0, 1]), torch.tensor([2, 0, 1, 1]), torch.tensor([1, 1, 1, 1])):
        agree(combine(groups, times.tolist()), x, y, times[group])
        agree(combine(groups, times.tolist()).difference(), x, y - x, times[group])
    assert combine([part.x for part in groups], [1, 0, 0, 0]).n == 23


def test_processes_add_their_sums() -> None:
    """Each its share of the rows, one of them none: all have the moments of all rows."""
    x, y = drawn(50, far=100.0)
    for cut in (20, 0):
        parts = [pair_moments(x[:cut], y[:cut]), pair_moments(x[cut:], y[cut:])]
        found = in_processes(lambda process, parts=parts: parts[process.rank].reduce(process))
        agree(found[0], x, y)
        assert torch.equal(found[0].cross, found[1].cross)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_rows_are_summed_in_float64(dtype: torch.dtype) -> None:
    """What the rows are is kept exactly."""
    x, y = (rows.to(dtype) for rows in drawn(200))
    agree(pair_moments(x, y), x, y)


def test_refusals() -> None:
    """Shapes that do not fit, values that are not finite, groups that are none, weights below 0."""
    x, y = drawn(10)
    for wrong in (
        lambda: moments(x[0]),
        lambda: pair_moments(x, y[:5]),
        lambda: pair_moments(x, y[0]),
        lambda: Running(5).add(x, y),
        lambda: Running(4).add(x),
        lambda: Running(5, 3).add(x),
        lambda: moments(x.where(x < x.max(), torch.nan)),
        lambda: pair_moments(x, y.where(y < y.max(), torch.inf)),
        lambda: combine([]),
        lambda: combine([moments(x)], [-1]),
        lambda: combine([moments(x)], [1, 2]),
        lambda: pair_moments(x, y).difference(),
        lambda: grouped_pair_moments([(x, y, torch.full((10,), 2))], 2, 5, 3),
    ):
        with pytest.raises(BadInputError):
            wrong()
