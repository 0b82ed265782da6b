"""Training, validation and test share no picture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyses.splits import deal_out, joined
from hooked_mm.errors import BadInputError


@given(n=st.integers(1, 40), ties=st.integers(0, 40), seed=st.integers(0, 2**31 - 1))
def test_tied_samples_are_one_group(n: int, ties: int, seed: int) -> None:
    """Through others too, and nobody else is: against names handed on until nothing changes."""
    one, other = np.random.default_rng(seed).integers(n, size=(2, ties)).tolist()
    names = list(range(n))
    for _ in range(n):
        for a, b in zip(one, other, strict=True):
            names[a] = names[b] = min(names[a], names[b])
    found = joined(n, one, other)
    assert (found[:, None] == found).tolist() == [[a == b for b in names] for a in names]


@given(n=st.integers(10, 200), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_no_picture_is_on_both_sides(n: int, size: int, seed: int) -> None:
    """Every sample is in one part, every group in one part alone, and shares are as asked for."""
    groups = np.arange(n * size) // size
    parts = deal_out(groups, (0.5, 0.25, 0.25), seed)
    assert (np.stack(list(parts.values())).sum(0) == 1).all()
    found = [set(groups[mask]) for mask in parts.values()]
    assert sum(map(len, found)) == len(set.union(*found)) == n
    assert [len(group) for group in found] == pytest.approx([n / 2, n / 4, n / 4], abs=1)


def test_the_seed_deals() -> None:
    """The same seed, the same parts; another one, others."""
    one, again, other = (deal_out(np.arange(50), seed=seed)["test"] for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()


@pytest.mark.parametrize(
    ("groups", "shares", "message"),
    [
        (np.arange(2), (0.6, 0.2, 0.2), "2 samples with pictures of their own.*one part would be empty"),
        (np.zeros(9, dtype=int), (0.6, 0.2, 0.2), "1 samples with pictures"),
        (np.arange(9), (0.6, 0.2), "give three above 0"),
        (np.arange(9), (0.6, 0.5, 0.2), "make up 1"),
    ],
)
def test_what_is_refused(groups: np.ndarray, shares: tuple[float, ...], message: str) -> None:
    """With the remedy."""
    with pytest.raises(BadInputError, match=message):
        deal_out(groups, shares)
