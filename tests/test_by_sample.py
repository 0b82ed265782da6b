"""Ratios of sums, bootstrapped over samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyses.by_sample import ratio_by_sample


@given(n=st.integers(1, 60), samples=st.integers(1, 10), seed=st.integers(0, 2**31 - 1))
def test_the_mean_is_the_ratio(n: int, samples: int, seed: int) -> None:
    """Whatever the sizes of samples."""
    rng = np.random.default_rng(seed)
    totals, weights, own = rng.standard_normal(n), rng.uniform(0.1, 5, n), rng.integers(samples, size=n)
    found = ratio_by_sample(totals, weights, own)
    assert len(found) == len(set(own.tolist()))
    assert float(found.mean()) == pytest.approx(totals.sum() / weights.sum())


def test_the_bootstrap_is_that_of_the_ratio() -> None:
    """Its spread over samples drawn anew is that of the ratio computed in full."""
    rng = np.random.default_rng(0)
    own = np.repeat(np.arange(150), rng.integers(1, 12, size=150))
    totals = rng.standard_normal(len(own)) + rng.standard_normal(150)[own]
    weights = rng.uniform(0.5, 2, len(own))
    above, below = np.bincount(own, totals), np.bincount(own, weights)
    drawn = rng.integers(150, size=(3000, 150))
    expected = (above[drawn].sum(1) / below[drawn].sum(1)).std()
    found = ratio_by_sample(totals, weights, own).numpy()
    assert found[drawn].mean(1).std() == pytest.approx(expected, rel=0.05)
