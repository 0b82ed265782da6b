"""Bootstrap intervals: against the normal interval of a mean, scipy's, coverage of a known mean, and plain loops."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hooked_mm import intervals
from hooked_mm.errors import BadInputError
from hooked_mm.intervals import bootstrap


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_ends_are_those_of_the_normal_interval(level: float) -> None:
    """Mean -+ z s / sqrt(n) with the n-divisor standard deviation, within the noise of 20,000 draws; and scipy's."""
    values = torch.as_tensor(np.random.default_rng(0).gamma(3.0, 1.0, 2000))
    found = bootstrap(values, draws=20_000, level=level)
    mean, error = values.mean().item(), values.std(correction=0).item() / 2000**0.5
    z = stats.norm.ppf((1 + level) / 2)
    assert found.estimate.item() == pytest.approx(mean, abs=1e-12)
    assert found.low.item() == pytest.approx(mean - z * error, abs=0.05 * error)
    assert found.high.item() == pytest.approx(mean + z * error, abs=0.05 * error)
    few = values[:30]
    theirs = stats.bootstrap(
        (few.numpy(),), np.mean, n_resamples=20_000, method="percentile", confidence_level=level, rng=1
    ).confidence_interval
    ours, width = bootstrap(few, draws=20_000, level=level), theirs.high - theirs.low
    assert [ours.low.item(), ours.high.item()] == pytest.approx([theirs.low, theirs.high], abs=0.03 * width)


def test_covers_the_true_mean_as_often_as_it_says() -> None:
    """Of 2,000 sets of 100 normal samples: 95 % less what the percentile method loses at this size (0.5 points)."""
    values = torch.randn(100, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bootstrap(values + 3, draws=600)
    covered = ((found.low <= 3) & (found.high >= 3)).double().mean().item()
    assert 0.925 < covered < 0.96


@given(n=st.integers(1, 30), seed=st.integers(0, 2**31 - 1), value=st.floats(-1e9, 1e9))
def test_equal_values_have_no_width(n: int, seed: int, value: float) -> None:
    """Exactly, though sums of such values round; nor do values of which only some count."""
    column = torch.full((n,), value, dtype=torch.float64)
    holes = column.where(torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5, torch.nan)
    holes[-1] = value
    found = bootstrap(torch.stack([column, holes], 1), draws=50, seed=seed)
    assert found.estimate.tolist() == found.low.tolist() == found.high.tolist() == [value] * 2


def test_columns_share_their_draws_and_leave_out_what_does_not_count() -> None:
    """Each column as if alone; a shifted column shifts its interval; NaN drops the sample for that column only."""
    base = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    holes = base.where(torch.arange(50) % 5 > 0, torch.nan)
    columns = torch.stack([base, base + 4, 2 * base, holes, torch.full_like(base, torch.nan)], 1)
    found = bootstrap(columns, seed=3)
    for column in range(4):
        alone = bootstrap(columns[:, column], seed=3)
        for whole, one in zip(found, alone, strict=True):
            assert whole[column].item() == pytest.approx(one.item(), abs=1e-12)
    for end in found:
        assert end[1].item() == pytest.approx(end[0].item() + 4)
        assert end[2].item() == pytest.approx(2 * end[0].item())
        assert end[4].isnan()
    assert found.estimate[3].item() == pytest.approx(holes.nanmean().item())
    # The same draws, one after the other.
    random, means = torch.Generator().manual_seed(3), []
    drawn = torch.randint(50, (1000, 50), generator=random)
    means = torch.stack([holes[row].nanmean() for row in drawn])
    assert found.low[3].item() == pytest.approx(np.quantile(means.numpy(), 0.025))
    assert found.high[3].item() == pytest.approx(np.quantile(means.numpy(), 0.975))


def test_the_seed_decides_and_memory_does_not() -> None:
    """The same whatever is drawn at a time; another seed draws others; any float comes back in float64."""
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    found = bootstrap(values)
    with mock.patch.object(intervals, "CHUNK", 333):
        parts = bootstrap(values)
    for whole, part in zip(found, parts, strict=True):
        assert torch.equal(whole, part)
        assert whole.dtype == torch.float64
    assert not torch.equal(bootstrap(values, seed=1).low, found.low)
    assert bootstrap(values.half())[0].shape == (3,)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (torch.zeros(0), {}),
        (torch.zeros(2, 2, 2), {}),
        (torch.tensor([1.0, torch.inf]), {}),
        (torch.zeros(3), {"draws": 0}),
        (torch.zeros(3), {"level": 95}),
    ],
)
def test_refusals(values: torch.Tensor, options: dict) -> None:
    """No samples, too many dimensions, infinite values, no draws, a level in per cent."""
    with pytest.raises(BadInputError):
        bootstrap(values, **options)
