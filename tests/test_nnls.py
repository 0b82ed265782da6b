"""Non-negative least squares for many rows at once, against scipy and closed forms."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from concept_dict import nnls as module
from concept_dict.nnls import RIDGE, nonnegative_least_squares

SEEDS = st.integers(0, 2**31 - 1)


def _solve(rows: np.ndarray, concepts: np.ndarray) -> np.ndarray:
    cross, gram = torch.as_tensor(rows @ concepts.T), torch.as_tensor(concepts @ concepts.T)
    return nonnegative_least_squares(cross, gram).double().numpy()


def _scipy(rows: np.ndarray, concepts: np.ndarray, ridge: float = 0.0) -> np.ndarray:
    """Row by row with scipy; a ridge becomes rows of sqrt(ridge) I below the concepts, with target 0."""
    k = len(concepts)
    system = np.vstack([concepts.T, ridge**0.5 * np.eye(k)])
    return np.stack([nnls(system, np.append(row, np.zeros(k)), maxiter=1000)[0] for row in rows])


@given(k=st.integers(1, 12), extra=st.integers(8, 20), scale=st.sampled_from([1e-5, 1.0, 1e5]), seed=SEEDS)
def test_equals_scipy(k: int, extra: int, scale: float, seed: int) -> None:
    """The same activations as scipy's active-set method in float64, where the concepts are independent."""
    rng = np.random.default_rng(seed)
    concepts = rng.standard_normal((k, 2 * k + extra))
    rows = rng.standard_normal((15, concepts.shape[1])) * scale
    np.testing.assert_allclose(_solve(rows, concepts), _scipy(rows, concepts), rtol=1e-5, atol=3e-6 * scale)


@given(
    k=st.integers(2, 14),
    d=st.integers(1, 8),
    copies=st.integers(0, 3),
    silent=st.booleans(),
    common=st.sampled_from([0.0, 1.0, 20.0]),
    seed=SEEDS,
)
def test_equals_scipy_with_the_ridge_on_dependent_concepts(
    k: int, d: int, copies: int, silent: bool, common: float, seed: int
) -> None:
    """Duplicated, cancelling, nearly parallel and zero concepts: the optimum with the ridge that the module states."""
    rng = np.random.default_rng(seed)
    # A common part makes all concepts nearly parallel.
    concepts = rng.standard_normal((k, d)) + common * rng.standard_normal(d)
    concepts = np.vstack([concepts, concepts[:copies]])
    if silent:
        concepts[k // 2] = 0
    rows = rng.standard_normal((12, d)) + common * rng.standard_normal(d)
    got = _solve(rows, concepts)
    expected = _scipy(rows, concepts, ridge=RIDGE * (concepts**2).sum(1).max())
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.max()))


@given(k=st.integers(20, 50), d=st.sampled_from([20, 100]), common=st.sampled_from([0.0, 0.5, 3.0]), seed=SEEDS)
def test_conditions_of_the_optimum(k: int, d: int, common: float, seed: int) -> None:
    """Karush-Kuhn-Tucker at sizes as in use: no slope below zero, and none where an activation is above zero."""
    rng = np.random.default_rng(seed)
    concepts = rng.standard_normal((k, d)) + common * rng.standard_normal(d)
    concepts /= np.linalg.norm(concepts, axis=1, keepdims=True)
    # More concepts than dimensions, or nearly parallel ones, need the exchange that cannot cycle.
    rows = (rng.random((60, k)) < 0.3) @ concepts + 0.3 * rng.standard_normal((60, d))
    found = _solve(rows, concepts)
    slope = found @ (concepts @ concepts.T + RIDGE * np.eye(k)) - rows @ concepts.T
    # Activations come back as float32.
    tolerance = 1e-6 * np.linalg.norm(rows, axis=1, keepdims=True) * max(1.0, found.max())
    assert (found >= 0).all()
    assert (slope >= -tolerance).all()
    assert (np.abs(slope) <= tolerance)[found > 0].all()
    # Both kinds of entries occur, so that neither condition holds for want of cases.
    assert 0.02 < (found > 0).mean() < 0.98


def test_orthonormal_concepts_have_a_closed_form() -> None:
    """For orthonormal concepts the activations are the positive parts of the projections."""
    rng = np.random.default_rng(0)
    concepts = np.linalg.qr(rng.standard_normal((9, 9)))[0][:5]
    rows = rng.standard_normal((40, 9))
    np.testing.assert_allclose(_solve(rows, concepts), np.maximum(rows @ concepts.T, 0), atol=1e-6)


def test_one_concept_has_a_closed_form() -> None:
    """For one concept of any length: max(0, z c) / ||c||^2."""
    rng = np.random.default_rng(1)
    concept, rows = 7 * rng.standard_normal((1, 4)), rng.standard_normal((30, 4))
    np.testing.assert_allclose(_solve(rows, concept), np.maximum(rows @ concept.T, 0) / (concept**2).sum(), rtol=1e-6)


def test_equal_concepts_share() -> None:
    """Two equal concepts get half of what one of them would have alone, and the others what they had."""
    rng = np.random.default_rng(2)
    concepts, rows = rng.standard_normal((4, 10)), rng.standard_normal((30, 10))
    alone, doubled = _solve(rows, concepts), _solve(rows, concepts[[0, 1, 2, 3, 1]])
    np.testing.assert_allclose(doubled[:, 1], doubled[:, 4], atol=1e-6)
    np.testing.assert_allclose(doubled[:, 1] + doubled[:, 4], alone[:, 1], atol=1e-5)
    np.testing.assert_allclose(doubled[:, [0, 2, 3]], alone[:, [0, 2, 3]], atol=1e-5)


def test_concepts_of_zero_norm_stay_silent() -> None:
    """A zero concept gets 0 even where rounding gave it a cross product; all zero is no division by zero."""
    gram = torch.diag(torch.tensor([1.0, 0.0]))
    found = nonnegative_least_squares(torch.tensor([[0.5, 1e-9], [-1.0, 3.0]]), gram)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.0], [0.0, 0.0]]), rtol=1e-6, atol=0)
    assert not nonnegative_least_squares(torch.ones(3, 2), torch.zeros(2, 2)).any()


@given(n=st.integers(1, 30), block=st.integers(1, 12), dependent=st.booleans(), seed=SEEDS)
def test_a_row_is_solved_alone(n: int, block: int, dependent: bool, seed: int) -> None:
    """The answer of a row depends neither on companions of any size, nor on order, nor on how many go together."""
    rng = np.random.default_rng(seed)
    concepts = rng.standard_normal((9, 6 if dependent else 20))
    # Beside a large row a small one is no rounding error.
    sizes = 10.0 ** rng.uniform(-9, 9, (n, 1))
    rows = rng.standard_normal((n, concepts.shape[1])) * sizes
    alone = np.vstack([_solve(row[None], concepts) for row in rows]) / sizes
    order = rng.permutation(n)
    with mock.patch.object(module, "ROWS", block):
        shuffled = _solve(rows[order], concepts) / sizes[order]
    for found in (_solve(rows, concepts)[order] / sizes[order], shuffled):
        np.testing.assert_allclose(found, alone[order], rtol=1e-6, atol=1e-6 * max(1.0, alone.max()))


@given(k=st.integers(1, 12), d=st.integers(1, 15), silent=st.booleans(), seed=SEEDS)
def test_a_start_does_not_matter(k: int, d: int, silent: bool, seed: int) -> None:
    """From good, bad and random activations, also of a concept of zero norm, the answer is that from none."""
    rng = np.random.default_rng(seed)
    concepts, rows = rng.standard_normal((k, d)), rng.standard_normal((20, d))
    if silent:
        concepts[k // 2] = 0
    cross, gram = torch.as_tensor(rows @ concepts.T), torch.as_tensor(concepts @ concepts.T)
    alone = nonnegative_least_squares(cross, gram)
    for near in (alone, torch.ones(20, k), torch.as_tensor(rng.random((20, k)) < 0.5).float()):
        found = nonnegative_least_squares(cross, gram, near)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6 * max(1.0, float(alone.max())))


@given(power=st.integers(-30, 30), length=st.integers(-10, 10), dependent=st.booleans(), seed=SEEDS)
def test_scale_passes_through(power: int, length: int, dependent: bool, seed: int) -> None:
    """Rows times a power of two have activations times that power, concepts times one the inverse, exactly."""
    rng = np.random.default_rng(seed)
    concepts, rows = rng.standard_normal((6, 4 if dependent else 9)), rng.standard_normal((8, 4 if dependent else 9))
    found = _solve(rows * 2.0**power, concepts * 2.0**length)
    np.testing.assert_array_equal(found, _solve(rows, concepts) * 2.0 ** (power - length))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_gives_float32(dtype: torch.dtype) -> None:
    """Products of any dtype are taken as the numbers they are; the answer is float32."""
    rng = np.random.default_rng(3)
    # Whole numbers below 256 are exact in every dtype.
    concepts, rows = rng.integers(-3, 4, (4, 6)).astype(float), rng.integers(-3, 4, (20, 6)).astype(float)
    cross, gram = torch.as_tensor(rows @ concepts.T), torch.as_tensor(concepts @ concepts.T)
    found = nonnegative_least_squares(cross.to(dtype), gram.to(dtype))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.double().numpy(), _scipy(rows, concepts), atol=1e-5)


def test_inputs_are_left_alone_and_none_is_fine() -> None:
    """The arguments keep their values; no rows give no activations."""
    cross, gram = torch.tensor([[1.0, -1.0]]), torch.eye(2)
    nonnegative_least_squares(cross, gram)
    assert cross.tolist() == [[1.0, -1.0]]
    assert gram.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    empty = nonnegative_least_squares(torch.zeros(0, 3), torch.eye(3))
    assert empty.shape == (0, 3)
    assert empty.dtype == torch.float32
