"""Gains by hand, intervals against another bootstrap, correlations against SciPy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, pearsonr, spearmanr

from concept_dict.gains import ENOUGH, Comparison, compare, correlate, counted, gain, relative_gain, values
from concept_dict.recovery import Recovery
from hooked_mm.errors import BadInputError

SEEDS = st.integers(0, 2**16)
NAN, INF = float("nan"), float("inf")


def _recovery(shifted: object, against: object, score: str = "cosine", form: str = "unshifted") -> Recovery:
    """Two forms' scores, every concept with a partner and rows enough."""
    one, other = np.asarray(shifted, float), np.asarray(against, float)
    many = np.full(len(one), 50)
    return Recovery(np.arange(len(one)), many, many, {"shifted": {score: one}, form: {score: other}})


def _counts(partner: list[int], counts: list[int], held_out: list[int]) -> Recovery:
    return Recovery(np.array(partner), np.array(counts), np.array(held_out), {})


def test_gains_by_hand() -> None:
    """More is better, of distances less."""
    assert gain(_recovery([0.9, 0.2, NAN], [0.5, 0.3, 0.1]), "cosine") == pytest.approx([0.4, -0.1, NAN], nan_ok=True)
    assert gain(_recovery([1.0, 5.0], [3.0, 4.0], "distance"), "distance").tolist() == [2, -1]
    over = _recovery([0.9], [0.5], "words", "global")
    assert gain(over, "words", against="global").tolist() == pytest.approx([0.4])
    assert gain(over, "words", "global", "shifted").tolist() == pytest.approx([-0.4])


def test_relative_gains_by_hand() -> None:
    """A share of what was missing; none where nothing was, and minus infinity for what was lost of it."""
    found = relative_gain(_recovery([0.9, 0.4, 1.0, 0.5, NAN], [0.8, 0.6, 1.0, 1.0, 0.5]), "cosine")
    assert found == pytest.approx([0.5, -0.5, 0, -INF, NAN], nan_ok=True)
    found = relative_gain(_recovery([1.0, 6.0, 0.0, 1.0], [4.0, 4.0, 0.0, 0.0], "distance"), "distance")
    assert found.tolist() == pytest.approx([0.75, -0.5, 0, -INF])


def test_xl_vlms_fault_relative_gain_by_the_old_cosine() -> None:
    """Old cosines near 0 or below: a share of the way to 1, never larger than 1, positive where it is a gain."""
    old, new = np.array([1e-6, -0.5, 0.0]), np.array([0.5, 0.25, 1.0])
    with np.errstate(divide="ignore"):
        theirs = (new - old) / old
    assert theirs[0] > 1e5
    assert theirs[1] < 0
    assert np.isinf(theirs[2])
    assert relative_gain(_recovery(new, old), "cosine").tolist() == pytest.approx([0.5, 0.5, 1.0], abs=1e-5)


@given(seed=SEEDS, score=st.sampled_from(["cosine", "distance"]))
def test_relative_gains_are_bounded_above(seed: int, score: str) -> None:
    """At most 1, reached where nothing is missing any more; the sign is the gain's."""
    rng = np.random.default_rng(seed)
    before, after = rng.uniform(-1 if score == "cosine" else 0, 1, (2, 30))
    after[:3] = 1 if score == "cosine" else 0
    recovery = _recovery(after, before, score)
    shares = relative_gain(recovery, score)
    assert (shares <= 1 + 1e-12).all()
    assert shares[:3] == pytest.approx(1)
    assert (np.sign(shares) == np.sign(gain(recovery, score))).all()


def test_nothing_is_gained_without_a_change() -> None:
    """Scores that are the same, complete ones and rounding among them: 0 everywhere, without a warning."""
    scores = np.array([1, 1 + 1e-12, 0.3, 0, -1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for score in ("cosine", "distance", "words"):
            same = _recovery(scores, scores, score)
            assert relative_gain(same, score).tolist() == [0] * 5
            assert compare(same, score, against="unshifted") == Comparison(0, 0, 0, 0, 0, 5)
    # The mean over draws of equal numbers may be another number in its last place.
    off = _recovery(scores, scores - 1e-16, "cosine", "random groups")
    assert compare(off, "cosine", against="random groups").improved == 0


def test_counted_by_hand() -> None:
    """A partner, and rows enough both to be moved by and to be measured on."""
    recovery = _counts([0, -1, 2, 3, 4], [20, 50, 19, 50, 21], [20, 50, 50, 19, 21])
    assert ENOUGH == 20
    assert counted(recovery).tolist() == [True, False, False, False, True]
    assert counted(recovery, 19).tolist() == [True, False, True, True, True]
    assert counted(recovery, 0).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("score", ["cosine", "distance"])
def test_comparisons_against_another_bootstrap(score: str) -> None:
    """Mean, interval, share: of the counted and finite alone; the interval as SciPy's within what draws differ by."""
    rng = np.random.default_rng(1)
    sign = -1 if score == "distance" else 1
    before = rng.uniform(0, 0.5, 40)
    after = before + sign * rng.normal(0.1, 0.1, 40)
    after[0] = NAN
    counts = np.full(40, 20)
    counts[1] = 19
    after[1] += 100
    recovery = Recovery(np.arange(40), counts, np.full(40, 20), {"shifted": {score: after}, "global": {score: before}})
    found = compare(recovery, score)
    gains = sign * (after - before)[2:]
    assert found.mean == pytest.approx(gains.mean())
    assert found.improved == pytest.approx((gains > 0).mean())
    assert found.worse == pytest.approx((gains < 0).mean())
    assert found.concepts == 38
    theirs = bootstrap((gains,), np.mean, method="percentile", n_resamples=10_000).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.003)
    # Pairs matter: of two sets that vary more than their differences do, the interval is as wide as the differences'.
    assert found.high - found.low == pytest.approx(2 * 1.96 * gains.std() / 38**0.5, rel=0.1)
    assert compare(recovery, score, seed=0) == found != compare(recovery, score, seed=1)
    assert compare(recovery, score, enough=19).concepts == 39


def test_intervals_of_few() -> None:
    """None of one concept, nothing at all of none."""
    one = compare(_recovery([0.5], [0.4]), "cosine", against="unshifted")
    assert (one.mean, one.improved, one.concepts) == (pytest.approx(0.1), 1, 1)
    assert np.isnan([one.low, one.high]).all()
    none = compare(_recovery([NAN], [0.4]), "cosine", against="unshifted")
    assert none.concepts == 0
    assert np.isnan([none.mean, none.low, none.high, none.improved]).all()


@given(seed=SEEDS, n=st.integers(5, 40))
def test_correlations_against_scipy(seed: int, n: int) -> None:
    """Where both are finite; monotonous but bent ones tell Pearson's from Spearman's."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    y = np.exp(2 * x) + rng.normal(size=n) * 0.1
    gaps_x, gaps_y = np.append(x, [NAN, 3, -INF, 1]), np.append(y, [3, NAN, 1, INF])
    found = correlate(gaps_x, gaps_y, seed)
    assert found.pearson == pytest.approx(pearsonr(x, y).statistic)
    assert found.spearman == pytest.approx(spearmanr(x, y).statistic)
    assert found.concepts == n
    assert -1 <= found.low <= found.high <= 1 + 1e-12


def test_the_interval_of_a_correlation() -> None:
    """As SciPy's bootstrap of pairs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = 0.5 * x + rng.normal(size=60)
    theirs = bootstrap(
        (x, y), lambda a, b: pearsonr(a, b).statistic, paired=True, vectorized=False, n_resamples=2000,
        method="percentile",
    ).confidence_interval  # fmt: skip
    found = correlate(x, y)
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.03)


def test_draws_of_one_concept_over_and_over_have_no_correlation() -> None:
    """Of three that fall, every draw that varies has r < 0; one in nine is of one number, which rounding makes vary."""
    x, y = np.array([0.1, 0.2, 0.4]), np.array([3.2, 2.7, 0.8])
    assert all((np.full(3, value) - np.full(3, value).mean() < 0).all() for value in [*x, *y])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = correlate(x, y)
    assert found.spearman == pytest.approx(-1)
    assert -1 - 1e-12 <= found.low <= found.high < -0.9


@pytest.mark.parametrize(
    ("one", "other", "concepts"),
    [
        ([1.0, 2], [2.0, 1], 2),
        ([1.0, 1, 1], [1.0, 2, 3], 3),
        ([1.0, 2, 3], [0.0, 0, 0], 3),
        ([1.0, NAN, NAN], [1.0, 2, 3], 1),
        ([], [], 0),
    ],
)
def test_correlations_that_are_none(one: list[float], other: list[float], concepts: int) -> None:
    """Too few, or one that does not vary: NaN, not a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = correlate(np.array(one), np.array(other))
    assert found.concepts == concepts
    assert np.isnan([found.pearson, found.low, found.high, found.spearman]).all()


def test_xl_vlms_fault_one_row_poisons_means() -> None:
    """A concept of one row, whose consistency is NaN, is left out of the correlation."""
    consistency, gained = np.array([0.1, 0.5, NAN, 0.9]), np.array([1.0, 2, 100, 4])
    assert correlate(consistency, gained).pearson == pytest.approx(pearsonr([0.1, 0.5, 0.9], [1, 2, 4]).statistic)


def test_refusals() -> None:
    """A form or a score that there is not is named, with those that there are."""
    recovery = _recovery([0.5], [0.4])
    with pytest.raises(BadInputError, match=r"globl.*"):
        values(recovery, "cosine", "globl")
    with pytest.raises(BadInputError, match=r"cosin.*cosine"):
        gain(recovery, "cosin")
