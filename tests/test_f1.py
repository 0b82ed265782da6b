"""Matched F1: scikit-learn's F1, every threshold tried, planted facts, and what chance gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from concept_dict.f1 import best_thresholds, f1_scores, match_f1
from hooked_mm.errors import BadInputError

SEEDS = st.integers(0, 2**31 - 1)


@given(
    n=st.integers(1, 40),
    levels=st.sampled_from([1, 2, 5, 50_000]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    seed=SEEDS,
)
def test_the_threshold_is_the_best_of_all(n: int, levels: int, dtype: type, seed: int) -> None:
    """Against every cut there is, with ties, by scikit-learn; and the threshold gives the F1 that is promised."""
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, levels, (n, 3)) - levels // 2).astype(dtype)
    truth = rng.random((n, 3)) < np.array([0.1, 0.5, 1.0])
    thresholds, best = best_thresholds(scores, truth)
    for column in range(3):
        own, labels = scores[:, column].astype(float), truth[:, column]
        tried = [f1_score(labels, own >= cut, zero_division=0.0) for cut in np.unique(own)]
        assert best[column] == pytest.approx(max(tried), abs=1e-12)
        reached = f1_score(labels, own > thresholds[column], zero_division=0.0)
        assert reached == pytest.approx(best[column], abs=1e-12)


def test_the_threshold_lies_halfway() -> None:
    """Between the scores it separates; below all of them it is minus infinity; the highest of several as good."""
    scores = np.array([[4.0], [2.0], [1.0], [0.0]])
    assert best_thresholds(scores, np.array([[1], [1], [0], [0]], bool))[0].tolist() == [1.5]
    assert best_thresholds(scores, np.ones((4, 1), bool))[0].tolist() == [-np.inf]
    # Saying yes to the first, and to all, are equally good: F1 = 2 / 3.
    thresholds, best = best_thresholds(scores, np.array([[1], [0], [0], [1]], bool))
    assert (thresholds.tolist(), best.tolist()) == ([3.0], [pytest.approx(2 / 3)])


@given(n=st.integers(1, 30), seed=SEEDS)
def test_f1_scores_equal_scikit_learn(n: int, seed: int) -> None:
    """Column by column; NaN where nothing is said and nothing true."""
    rng = np.random.default_rng(seed)
    said, truth = rng.random((2, n, 4)) < np.array([0.0, 0.3, 0.7, 1.0])
    for column, found in enumerate(f1_scores(said, truth)):
        expected = f1_score(truth[:, column], said[:, column], zero_division=np.nan)
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_planted_pairs() -> None:
    """Concepts that follow facts score 1 held out, shuffled labels what a guess gives."""
    rng = np.random.default_rng(0)
    truth, held = rng.random((300, 6)) < 0.3, rng.random((250, 6)) < 0.3
    wanted = np.array([4, 0, 2])

    def scores(facts: np.ndarray) -> np.ndarray:
        return facts[:, wanted] * 2.0 + rng.random((len(facts), 3))

    found = match_f1(scores(truth), truth, scores(held), held, np.arange(3), wanted, shuffles=30)
    np.testing.assert_allclose(found.chosen, 1.0)
    np.testing.assert_allclose(found.held_out, 1.0)
    assert ((found.threshold > 1) & (found.threshold < 2)).all()
    # The best that can be done without knowing anything is always to say yes.
    np.testing.assert_allclose(found.shuffled, 2 * 0.3 / 1.3, atol=0.08)


def test_the_threshold_is_not_chosen_on_the_held_out_samples() -> None:
    """Held-out activations of another scale are scored by the threshold that was chosen, not by their own."""
    rng = np.random.default_rng(1)
    truth, held = rng.random((100, 1)) < 0.5, rng.random((100, 1)) < 0.5
    pair = np.zeros(1, int)
    found = match_f1(truth * 2.0, truth, held * 0.5, held, pair, pair)
    assert found.chosen.tolist() == [1.0]
    assert found.held_out.tolist() == [0.0]
    doubled = match_f1(truth * 2.0, truth, 5.0 + held, held, pair, pair)
    assert doubled.held_out[0] == pytest.approx(f1_score(held[:, 0], np.ones(100)))


def test_the_same_seed_shuffles_alike() -> None:
    """The baseline is the same for one seed, and another for another."""
    rng = np.random.default_rng(4)
    parts = (rng.random((40, 5)), rng.random((40, 8)) < 0.5, rng.random((40, 5)), rng.random((40, 8)) < 0.5)
    pairs = (np.arange(5), np.array([7, 1, 1, 0, 3]))
    first, again, other = (match_f1(*parts, *pairs, seed=seed).shuffled for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("concepts", "facts", "held", "reason"),
    [
        ([-1], [0], 4, "concept -1 of 2 can't be scored"),
        ([1], [3], 4, "fact 3 of 3 can't be scored"),
        ([0], [0], 5, "4 scores for 5 truths"),
    ],
)
def test_bad_pairs(concepts: list[int], facts: list[int], held: int, reason: str) -> None:
    """What has no partner, or sets that do not fit, are refused by name."""
    scores, truth = np.ones((4, 2)), np.ones((4, 3), bool)
    with pytest.raises(BadInputError, match=reason):
        match_f1(scores, truth, scores, np.ones((held, 3), bool), np.array(concepts), np.array(facts))
