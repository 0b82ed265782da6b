"""Bands by sample against plain loops over the same draws, a refit bootstrap, and samples of many rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analyses.anisotropy import anisotropy
from analyses.linearity import linearity
from analyses.resampling import of_rows, share
from hooked_mm.errors import BadInputError
from hooked_mm.intervals import bootstrap, times_drawn


def test_shares_are_those_of_plain_loops() -> None:
    """sum a / sum b of the drawn samples; of equal wholes the means of `intervals.bootstrap`, draw for draw."""
    random = torch.Generator().manual_seed(0)
    parts, wholes = (torch.rand(30, 2, dtype=torch.float64, generator=random) for _ in range(2))
    found = share(parts, wholes, draws=150, seed=4)
    drawn = torch.randint(30, (150, 30), generator=torch.Generator().manual_seed(4))
    each = torch.stack([parts[row].sum(0) / wholes[row].sum(0) for row in drawn])
    for column in range(2):
        assert float(found.estimate[column]) == pytest.approx(float(parts[:, column].sum() / wholes[:, column].sum()))
        ends = np.quantile(each[:, column].numpy(), [0.025, 0.975])
        assert [float(found.low[column]), float(found.high[column])] == pytest.approx(ends.tolist(), abs=1e-12)
    means = bootstrap(parts, draws=150, seed=4)
    ours = share(parts, torch.ones_like(parts), draws=150, seed=4)
    for one, other in zip(ours, means, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_estimates_on_rows_draw_whole_samples() -> None:
    """Every row of a drawn sample, as often as it was drawn; what an estimate refuses does not count."""
    samples = torch.tensor([7, 7, 3, 3, 3, 9])
    seen = []

    def estimate(rows: torch.Tensor) -> list[float]:
        seen.append(rows.tolist())
        if len(rows) < 4:
            raise BadInputError("too few")
        return [float(rows.double().mean())]

    found = of_rows(samples, estimate, draws=40, seed=1)
    assert seen[0] == [0, 1, 2, 3, 4, 5]
    of = {3: [2, 3, 4], 7: [0, 1], 9: [5]}
    drawn = torch.randint(3, (40, 3), generator=torch.Generator().manual_seed(1))
    wanted = [sorted(row for one in draw.tolist() for row in of[[3, 7, 9][one]]) for draw in drawn]
    assert seen[1:] == wanted
    means = [np.mean(rows) for rows in wanted if len(rows) >= 4]
    assert len(means) < 40
    assert [float(found.low), float(found.high)] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist())


def test_a_fit_held_fixed_gives_the_bands_of_refits() -> None:
    """Of many rows a dimension: linearity and anisotropy refitted on every draw have the same bands, within noise."""
    random = torch.Generator().manual_seed(0)
    samples = torch.arange(60).repeat_interleave(40)
    x = (
        torch.randn(2400, 4, generator=random) * torch.tensor([2.0, 1, 1, 1])
        + torch.randn(60, 4, generator=random)[samples]
    )
    y = x + torch.tanh(x) * torch.rand(60, 1, generator=random)[samples] * 4

    def refit(rows: torch.Tensor) -> list[float]:
        return [linearity(x[rows], y[rows]).score, anisotropy(x[rows])]

    refitted = of_rows(samples, refit, draws=150)
    wide, target = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    left = (target - wide @ torch.linalg.lstsq(wide, target).solution).square().sum(1)
    first = torch.linalg.svd(wide, full_matrices=False).Vh[0]
    parts, wholes = torch.zeros(60, 2, dtype=torch.float64), torch.zeros(60, 2, dtype=torch.float64)
    parts.index_add_(0, samples, torch.stack([target.square().sum(1) - left, (wide @ first).square()], 1))
    wholes.index_add_(0, samples, torch.stack([target.square().sum(1), wide.square().sum(1)], 1))
    fixed = share(parts, wholes, draws=150)
    for score in range(2):
        width = float(refitted.high[score] - refitted.low[score])
        assert float(fixed.estimate[score]) == pytest.approx(float(refitted.estimate[score]), abs=1e-6)
        assert float(fixed.low[score]) == pytest.approx(float(refitted.low[score]), abs=0.2 * width)
        assert float(fixed.high[score]) == pytest.approx(float(refitted.high[score]), abs=0.2 * width)


def test_samples_not_rows_are_drawn() -> None:
    """Rows that are copies within their sample make no band narrower."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    samples = torch.arange(40).repeat_interleave(25)
    many = of_rows(samples, lambda rows: [float(values[samples[rows]].mean())], draws=100)
    one = of_rows(torch.arange(40), lambda rows: [float(values[rows].mean())], draws=100)
    assert float(many.high - many.low) == pytest.approx(float(one.high - one.low))


def test_refusals() -> None:
    """Shapes that differ, no samples, no draws."""
    for wrong in (
        lambda: share(torch.ones(3, 1), torch.ones(3, 2)),
        lambda: share(torch.ones(3), torch.ones(3)),
        lambda: share(torch.ones(0, 1), torch.ones(0, 1)),
        lambda: list(times_drawn(3, 0, 0)),
        lambda: of_rows(torch.zeros(0), lambda _: [0.0]),
    ):
        with pytest.raises(BadInputError):
            wrong()
