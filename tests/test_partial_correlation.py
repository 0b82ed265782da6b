"""Attention as covariance, partial correlations and Fisher's z, against regressions written out and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from analyses.partial_correlation import (
    ALPHA,
    FisherTest,
    attention_correlation,
    fisher_p,
    fisher_test,
    partial_correlation,
)
from hooked_mm.errors import BadInputError


def toy() -> np.ndarray:
    """The attention of the specification's toy case."""
    lower = np.tril(np.random.default_rng(0).standard_normal((8, 8)))
    raised = np.exp(lower) * np.tril(np.ones((8, 8)))
    return raised / raised.sum(axis=1, keepdims=True)


def attention(seed: int) -> np.ndarray:
    """A causal head's rows, sharp as trained ones are; (nodes, keys), the keys beside the nodes included."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(6, 13))
    raised = np.exp(3 * rng.standard_normal((count, count))) * np.tril(np.ones((count, count)))
    return (raised / raised.sum(axis=1, keepdims=True))[int(rng.integers(0, 3)) :]


def by_regression(rows: np.ndarray, i: int, j: int, given: tuple[int, ...]) -> float:
    """The correlation, about zero, of what least squares leave of two rows; NaN if that is nothing of one of them."""
    left = []
    for own in (rows[i], rows[j]):
        design = rows[list(given)].T
        left.append(own - design @ np.linalg.lstsq(design, own, rcond=None)[0] if given else own)
        if np.linalg.norm(left[-1]) < 1e-6 * np.linalg.norm(own):
            return math.nan
    return float(left[0] @ left[1] / math.sqrt((left[0] @ left[0]) * (left[1] @ left[1])))


@pytest.mark.parametrize(
    ("given", "rho", "p"),
    [((), 0.361886, 2.25565e-5), ((5,), 0.257332, 3.37420e-3), ((5, 2), 0.285501, 1.12654e-3)],
)
def test_the_toy_case(given: tuple[int, ...], rho: float, p: float) -> None:
    """To the digits of the specification."""
    test = fisher_test(torch.from_numpy(toy()))
    assert partial_correlation(test.rows, 7, 3, given) == pytest.approx(rho, abs=5e-7)
    assert test.p_value(7, 3, given) == pytest.approx(p, rel=5e-6)


def test_decisions_equal_a_reference_on_200_random_graphs() -> None:
    """Residuals of regressions and scipy's normal distribution decide the same, of every pair and set."""
    compared = independent = 0
    for seed in range(200):
        rows, alpha = attention(seed), (1e-5, 1e-2, 0.3)[seed % 3]
        test, rng = fisher_test(torch.from_numpy(rows), alpha), np.random.default_rng(seed)
        for _ in range(10):
            i, j, *others = rng.permutation(len(rows)).tolist()
            chosen = tuple(others[: int(rng.integers(0, min(5, len(others))))])
            rho = by_regression(rows, i, j, chosen)
            p = 2 * norm.sf(math.sqrt(128 - len(chosen) - 3) * abs(math.atanh(rho)))
            found = test.p_value(i, j, chosen)
            assert found == pytest.approx(p, rel=1e-5, abs=1e-12, nan_ok=True), (seed, i, j, chosen)
            told = test(i, j, chosen)
            assert told == (None if math.isnan(p) else p > alpha)
            compared, independent = compared + 1, independent + bool(told)
    # Neither answer is rare.
    assert 0.1 < independent / compared < 0.9


def test_lvlm_interpret_covariance_is_not_centred() -> None:
    """Rows that attend alike beside a common sink correlate by what they hold, not by how they deviate from 1/N."""
    rows = torch.tensor([[0.8, 0.2, 0.0, 0.0], [0.8, 0.0, 0.2, 0.0], [0.1, 0.3, 0.3, 0.3]], dtype=torch.float64)
    found = attention_correlation(rows)
    assert float(found[0, 1]) == pytest.approx(0.64 / 0.68)
    assert float(found[0, 2]) == pytest.approx(0.14 / math.sqrt(0.68 * 0.28))
    centred = np.corrcoef(rows.numpy())
    assert centred[0, 2] < 0 < float(found[0, 2])


def test_all_keys_count_not_the_nodes_alone() -> None:
    """Two nodes that only share a token which is no node are correlated: that is what a latent cause does."""
    rows = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])
    assert float(attention_correlation(rows)[0, 1]) == pytest.approx(0.5)
    assert float(attention_correlation(rows[:, 1:])[0, 1]) == 0


def test_lvlm_interpret_alpha_is_passed_through() -> None:
    """The level decides, and is the specification's unless told."""
    rows = torch.from_numpy(toy())
    assert fisher_test(rows).alpha == ALPHA == 1e-5
    assert fisher_test(rows)(7, 3) is True
    assert fisher_test(rows, alpha=1e-4)(7, 3) is False
    assert fisher_test(rows, samples=16)(7, 3) is True


@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_neither_scale_nor_order_matters(seed: int, scale: float) -> None:
    """Of a row, of i and j, or of the conditions."""
    rows = attention(seed)
    left, whole = fisher_test(torch.from_numpy(rows)).rows, attention_correlation(torch.from_numpy(rows))
    rows[0] *= scale
    right = fisher_test(torch.from_numpy(rows)).rows
    np.testing.assert_allclose(attention_correlation(torch.from_numpy(rows)), whole, atol=1e-12)
    np.testing.assert_allclose(left @ left.T, whole, atol=1e-12)
    one, other = partial_correlation(left, 0, 1, (2, 3)), partial_correlation(right, 1, 0, (3, 2))
    assert one == pytest.approx(other, abs=1e-9)


def test_conditions_that_repeat_each_other_count_once() -> None:
    """The pseudo-inverse takes a singular set for what it spans."""
    rows = attention(3)
    doubled = np.concatenate([rows, rows[2:3], rows[2:3] + rows[3:4]])
    test = fisher_test(torch.from_numpy(doubled))
    count = len(rows)
    for repeated, plain in (((2, count), (2,)), ((2, 3, count + 1), (2, 3))):
        expected = by_regression(rows, 0, 1, plain)
        assert partial_correlation(test.rows, 0, 1, repeated) == pytest.approx(expected, abs=1e-7)


def test_a_row_that_the_conditions_make_up_is_refused() -> None:
    """There is no correlation with nothing; the answer is neither yes nor no."""
    rows = attention(4)
    mixed = np.concatenate([rows, (rows[1:2] + rows[2:3]) / 2])
    test = fisher_test(torch.from_numpy(mixed))
    assert math.isnan(partial_correlation(test.rows, len(rows), 0, (1, 2)))
    assert test(len(rows), 0, (1, 2)) is None
    assert test(0, len(rows), (1, 2)) is None
    assert test(0, 1, tuple(range(2, len(rows)))) is not None


def test_what_fishers_z_cannot_tell() -> None:
    """No freedom left, no correlation; a perfect one leaves no doubt."""
    assert math.isnan(fisher_p(0.5, conditioned=13, samples=16))
    assert math.isnan(fisher_p(math.nan))
    assert fisher_p(1.0) == fisher_p(-1.0) == 0
    assert fisher_p(0.0) == 1
    assert fisher_p(0.3, 2) == pytest.approx(2 * norm.sf(math.sqrt(123) * math.atanh(0.3)))
    assert fisher_p(-0.3, 2) == fisher_p(0.3, 2)


def test_what_makes_no_sense_is_refused() -> None:
    """With the value, and why."""
    square = np.eye(3)
    with pytest.raises(BadInputError, match="all be different"):
        partial_correlation(square, 0, 1, (1,))
    with pytest.raises(BadInputError, match="attention row is zero"):
        attention_correlation(torch.zeros(2, 3))
    with pytest.raises(BadInputError, match="not finite"):
        attention_correlation(torch.tensor([[1.0, math.nan], [0.5, 0.5]]))
    with pytest.raises(BadInputError, match="alpha=0"):
        FisherTest(square, alpha=0)
    with pytest.raises(BadInputError, match="samples=3"):
        FisherTest(square, samples=3)
