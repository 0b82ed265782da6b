"""Shift vectors against numpy, SciPy and double loops in float64; rows of any dtype, groups of any size."""

from __future__ import annotations

import warnings
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean

from concept_dict.shift import AVERAGES, Average, average, main_concept, movements, shift_vectors
from hooked_mm.errors import BadInputError

SEEDS = st.integers(0, 2**16)


def _drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def _consistency(rows: np.ndarray, vector: np.ndarray) -> tuple[float, float]:
    """Pair by pair, of the rows that moved."""
    moved = [row for row in rows.astype(np.float64) if np.linalg.norm(row) > 0]
    pairs = [_cosine(one, other) for one, other in combinations(moved, 2)]
    length = np.linalg.norm(vector)
    with_vector = [_cosine(row, vector.astype(np.float64)) for row in moved] if length else []
    return (
        float(np.mean(pairs)) if pairs else float("nan"),
        float(np.mean(with_vector)) if with_vector else float("nan"),
    )


@given(n=st.integers(1, 12), seed=SEEDS, trim=st.sampled_from([0.0, 0.1, 0.25, 0.34, 0.49]))
def test_averages_against_numpy_and_scipy(n: int, seed: int, trim: float) -> None:
    """Also of an even number of rows, of ties, and where a tenth of the rows is less than one."""
    rows = (_drawn(seed, n, 5) * 4).round() / 2
    wide = rows.double().numpy()
    np.testing.assert_allclose(average(rows), wide.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(average(rows, "median"), np.median(wide, axis=0), atol=1e-6)
    np.testing.assert_allclose(average(rows, "trimmed", trim), trim_mean(wide, trim, axis=0), atol=1e-6)


def test_averages_by_hand() -> None:
    """An outlier moves the mean alone; a median of an even number lies in the middle."""
    rows = torch.tensor([[0.0, 1], [1, 1], [2, 1], [100, 1]])
    assert average(rows).tolist() == [25.75, 1]
    assert average(rows, "median").tolist() == [1.5, 1]
    assert average(rows, "trimmed", 0.25).tolist() == [1.5, 1]
    assert average(rows, "trimmed", 0.1).tolist() == [25.75, 1]
    assert average(rows[:0]).tolist() == [0, 0]


@given(n=st.integers(1, 25), k=st.integers(1, 6), seed=SEEDS, how=st.sampled_from(AVERAGES))
def test_shifts_against_loops(n: int, k: int, seed: int, how: Average) -> None:
    """Vectors, counts and both consistencies, with rows of no concept, rows that stay, groups of none and of one."""
    rng = np.random.default_rng(seed)
    deltas = _drawn(seed, n, 4) + 1
    deltas[torch.as_tensor(rng.random(n) < 0.2)] = 0
    concept = torch.as_tensor(rng.integers(-1, k, n))
    found = shift_vectors(deltas, concept, k, how)
    assert found.vectors.dtype == found.pairwise.dtype == torch.float32
    for number in range(k):
        group = deltas[concept == number].numpy().astype(np.float64)
        assert int(found.counts[number]) == len(group)
        expected = {"mean": np.mean, "median": np.median, "trimmed": lambda rows, axis: trim_mean(rows, 0.1, axis)}[how]
        vector = expected(group, axis=0) if len(group) else np.zeros(4)
        np.testing.assert_allclose(found.vectors[number], vector, atol=1e-6)
        np.testing.assert_allclose(found.magnitude[number], np.linalg.norm(vector), atol=1e-6)
        pairwise, to_mean = _consistency(group, found.vectors[number].numpy())
        np.testing.assert_allclose(found.pairwise[number], pairwise, atol=1e-6)
        np.testing.assert_allclose(found.to_mean[number], to_mean, atol=1e-6)
    np.testing.assert_allclose(found.overall, average(deltas, how), atol=1e-6)


@given(seed=SEEDS, how=st.sampled_from(AVERAGES))
def test_the_order_of_rows_does_not_matter(seed: int, how: Average) -> None:
    """The same rows in another order."""
    deltas, concept = _drawn(seed, 40, 6) + 0.5, torch.arange(40) % 4 - 1
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    one, other = shift_vectors(deltas, concept, 3, how), shift_vectors(deltas[order], concept[order], 3, how)
    for name in ("vectors", "counts", "pairwise", "to_mean", "overall"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-6, rtol=1e-6)


@given(seed=SEEDS, noise=st.sampled_from([0.0, 0.1, 1.0]))
def test_a_planted_shift_is_recovered(seed: int, noise: float) -> None:
    """A known Delta per group, with noise in every row: cosine, size, and what consistency must then be."""
    d, n = 16, 200
    truth = _drawn(seed, 3, d) * torch.tensor([1.0, 3.0, 10.0])[:, None]
    concept = torch.arange(3 * n) % 3
    original = _drawn(seed + 1, 3 * n, d) * 5
    tuned = original + truth[concept] + noise * _drawn(seed + 2, 3 * n, d)
    found = shift_vectors(movements(original, tuned), concept, 3)
    assert bool((torch.cosine_similarity(found.vectors, truth, dim=1) > 0.99).all())
    torch.testing.assert_close(found.vectors, truth, atol=5 * noise / n**0.5 + 1e-5, rtol=0)
    # The mean cosine of two rows v + e: near |v|^2 / (|v|^2 + noise^2 d).
    size = truth.square().sum(dim=1)
    torch.testing.assert_close(found.pairwise, size / (size + noise**2 * d), atol=0.05, rtol=0)


def test_models_that_are_the_same_do_not_move() -> None:
    """Everything 0, consistency not known, no warning."""
    rows = _drawn(0, 30, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = shift_vectors(movements(rows, rows.clone()), torch.arange(30) % 5, 6)
    assert not found.vectors.any()
    assert not found.overall.any()
    assert not found.magnitude.any()
    assert bool(found.pairwise.isnan().all())
    assert bool(found.to_mean.isnan().all())
    assert found.counts.tolist() == [6, 6, 6, 6, 6, 0]


def test_opposite_movements() -> None:
    """Two rows that move against each other: cosine -1, no shift, so none to compare with."""
    found = shift_vectors(torch.tensor([[1.0, 2], [-1, -2]]), torch.tensor([0, 0]), 1)
    assert found.pairwise.tolist() == pytest.approx([-1])
    assert found.magnitude.tolist() == [0]
    assert bool(found.to_mean.isnan())


def test_main_concept_by_hand() -> None:
    """The largest; the first of equals; none where nothing is above 0, or nothing is known."""
    nan = float("nan")
    rows = [[0, 2, 1], [3, 3, 0], [0, 0, 0], [-1, -2, -3], [nan, 1, 2], [-1, 0, 1e-9]]
    assert main_concept(torch.tensor(rows)).tolist() == [1, 0, -1, -1, -1, 2]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_xl_vlms_fault_half_precision_arithmetic(kind: torch.dtype) -> None:
    """Rows near float16's largest, many of them: the answers are those of the same numbers in float32, and float64."""
    drawn = _drawn(3, 4000, 6)
    original, tuned = (30_000 + 50 * drawn).to(kind), (60_000 + 300 * drawn.flip(0)).to(kind)
    concept = torch.arange(4000) % 3
    wide = tuned.double().numpy() - original.double().numpy()
    added_up = sum((tuned - original)[1:], start=(tuned - original)[0])
    assert added_up.dtype == kind
    # What arithmetic in that dtype would give.
    assert not np.isclose(added_up.double().numpy() / 4000, wide.mean(axis=0), rtol=0.5).any()
    for how in AVERAGES:
        found = shift_vectors(movements(original, tuned), concept, 3, how)
        same = shift_vectors(movements(original.float(), tuned.float()), concept, 3, how)
        for name in ("vectors", "pairwise", "to_mean", "overall"):
            assert getattr(found, name).dtype == torch.float32
            assert torch.equal(getattr(found, name), getattr(same, name))
    means = np.stack([wide[concept.numpy() == number].mean(axis=0) for number in range(3)])
    np.testing.assert_allclose(shift_vectors(movements(original, tuned), concept, 3).vectors, means, rtol=1e-6)


def test_movements_beyond_float16() -> None:
    """The difference of two rows may be twice float16's largest number."""
    original, tuned = torch.tensor([[-60_000.0]]).half(), torch.tensor([[60_000.0]]).half()
    assert bool((tuned - original).isinf())
    assert movements(original, tuned).item() == 120_000


def test_xl_vlms_fault_crash_on_concepts_without_samples() -> None:
    """Counted as 0, with no movement; the others are what they are without them."""
    deltas = torch.tensor([[1.0, 0], [3, 0]])
    found = shift_vectors(deltas, torch.tensor([2, 2]), 4)
    assert found.counts.tolist() == [0, 0, 2, 0]
    assert found.vectors.tolist() == [[0, 0], [0, 0], [2, 0], [0, 0]]
    assert found.pairwise.isnan().tolist() == [True, True, False, True]
    nothing = shift_vectors(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 2)
    assert nothing.counts.tolist() == [0, 0]
    assert nothing.overall.tolist() == [0, 0]


def test_xl_vlms_fault_pairs_at_right_angles_are_left_out() -> None:
    """A cosine of exactly 0 is a cosine: three axes have mean 0, two alike among them 1/3."""
    axes = shift_vectors(torch.eye(3), torch.zeros(3, dtype=torch.long), 1)
    assert axes.pairwise.tolist() == pytest.approx([0], abs=1e-7)
    alike = shift_vectors(torch.eye(3)[[0, 0, 1]], torch.zeros(3, dtype=torch.long), 1)
    assert alike.pairwise.tolist() == pytest.approx([1 / 3])


def test_xl_vlms_fault_one_row_poisons_means() -> None:
    """A concept of one row has no pairs: NaN for it alone, and its own row as its shift."""
    deltas = torch.tensor([[1.0, 0], [1, 0], [5, 5]])
    found = shift_vectors(deltas, torch.tensor([0, 0, 1]), 2)
    assert found.pairwise.isnan().tolist() == [False, True]
    assert found.to_mean.tolist() == pytest.approx([1, 1])
    assert found.vectors[1].tolist() == [5, 5]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: movements(torch.zeros(3, 2), torch.zeros(4, 2)), "not in pairs"),
        (lambda: movements(torch.zeros(3), torch.zeros(3)), "not in pairs"),
        (lambda: movements(torch.zeros(2, 2), torch.tensor([[0, 0], [0, torch.inf]])), "row 1 of the fine-tuned model"),
        (lambda: movements(torch.tensor([[torch.nan]]), torch.zeros(1, 1)), "row 0 of the original model"),
        (lambda: average(torch.zeros(2, 2), "middle"), "median"),  # type: ignore[arg-type]
        (lambda: average(torch.zeros(2, 2), "trimmed", 0.5), r"trim=0.5"),
        (lambda: average(torch.zeros(2, 2), "trimmed", -0.1), r"trim=-0.1"),
        (lambda: shift_vectors(torch.zeros(2, 2), torch.zeros(3, dtype=torch.long), 1), "give one per row"),
        (lambda: shift_vectors(torch.zeros(2, 2), torch.tensor([0, 4]), 4), "concept 4, but there are 4"),
        (lambda: shift_vectors(torch.zeros(2, 2), torch.tensor([0, -2]), 4), "concept -2"),
    ],
)
def test_refusals(call: Any, text: str) -> None:
    """The value and the reason."""
    with pytest.raises(BadInputError, match=text):
        call()
