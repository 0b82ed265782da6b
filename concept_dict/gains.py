"""What a form of the concepts gains over another: per concept, as a mean with a paired bootstrap interval, and whether
gains go with the consistency of the shifts (arXiv 2501.03012, section 3.2).

Gains are positive where the form is better, of distances too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import pearsonr, spearmanr

from concept_dict.recovery import Recovery
from hooked_mm.errors import unknown

ENOUGH = 20
"""Rows that a concept needs, in its shift and held out, to count in a comparison."""

RESAMPLES = 10_000
"""Times that concepts are drawn again for an interval."""

ROUNDING = 1e-9
"""Differences below it are none: a cosine of 1 may come out a little above or below."""


def values(recovery: Recovery, score: str, form: str) -> Float[np.ndarray, " k"]:
    """A form's score per concept.

    Raises:
        BadInputError: For a form or a score that was not computed.
    """
    if form not in recovery.scores:
        raise unknown("form", form, recovery.scores)
    if score not in recovery.scores[form]:
        raise unknown("score", score, recovery.scores[form])
    return recovery.scores[form][score]


def gain(recovery: Recovery, score: str, form: str = "shifted", against: str = "unshifted") -> Float[np.ndarray, " k"]:
    """By how much the form is better, per concept."""
    difference = values(recovery, score, form) - values(recovery, score, against)
    return -difference if score == "distance" else difference


def relative_gain(
    recovery: Recovery, score: str, form: str = "shifted", against: str = "unshifted"
) -> Float[np.ndarray, " k"]:
    """The gain as a share of what was missing: of the distance, or of what the score lacked to 1.

    0 where nothing was missing and nothing was lost; -inf where nothing was missing and something was lost.
    """
    before, gained = values(recovery, score, against), gain(recovery, score, form, against)
    missing = before if score == "distance" else 1 - before
    complete = np.abs(missing) < ROUNDING
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(complete, np.where(np.abs(gained) < ROUNDING, 0.0, -np.inf), gained / missing)
    return np.where(np.isnan(before) | np.isnan(gained), np.nan, shares)


def counted(recovery: Recovery, enough: int = ENOUGH) -> Bool[np.ndarray, " k"]:
    """Concepts that have a partner and enough rows, both to be shifted by and to be measured on."""
    return (recovery.partner >= 0) & (recovery.counts >= enough) & (recovery.held_out >= enough)


@dataclass(frozen=True)
class Comparison:
    """Two forms over concepts: mean gain, its 95 % interval, the shares of concepts that gain and that lose,
    and how many there are.

    `low` and `high` are NaN for fewer than two concepts.
    """

    mean: float
    low: float
    high: float
    improved: float
    worse: float
    concepts: int


def compare(
    recovery: Recovery,
    score: str,
    form: str = "shifted",
    against: str = "global",
    *,
    enough: int = ENOUGH,
    seed: int = 0,
) -> Comparison:
    """The gain of a form over another, concept by concept, over those with enough rows (see `counted`)."""
    found = gain(recovery, score, form, against)[counted(recovery, enough)]
    found = found[np.isfinite(found)]
    if not len(found):
        nothing = float("nan")
        return Comparison(nothing, nothing, nothing, nothing, nothing, 0)
    low, high = _interval(found, seed=seed)
    better, worse = (float(side.mean()) for side in (found > ROUNDING, found < -ROUNDING))
    return Comparison(float(found.mean()), low, high, better, worse, len(found))


def _interval(found: Float[np.ndarray, " n"], seed: int) -> tuple[float, float]:
    """95 % of the means of concepts drawn again, with replacement."""
    if len(found) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(found), size=(RESAMPLES, len(found)))
    low, high = np.percentile(found[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Correlation:
    """Pearson's r between two numbers of the concepts, its 95 % bootstrap interval, Spearman's rho, and how many."""

    pearson: float
    low: float
    high: float
    spearman: float
    concepts: int


def correlate(one: Float[np.ndarray, " k"], other: Float[np.ndarray, " k"], seed: int = 0) -> Correlation:
    """Over the concepts where both are finite; NaN for fewer than three, or where one of them does not vary."""
    kept = np.isfinite(one) & np.isfinite(other)
    x, y = one[kept], other[kept]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(float("nan"), float("nan"), float("nan"), float("nan"), len(x))
    drawn = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES, len(x)))
    a, b = x[drawn], y[drawn]
    # A draw of one concept over and over has no correlation (what rounding leaves of its differences would have one).
    varied = (np.ptp(a, axis=1) > 0) & (np.ptp(b, axis=1) > 0)
    a, b = (side - side.mean(axis=1, keepdims=True) for side in (a[varied], b[varied]))
    again = (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    low, high = np.percentile(again, [2.5, 97.5])
    return Correlation(
        float(pearsonr(x, y).statistic), float(low), float(high), float(spearmanr(x, y).statistic), len(x)
    )
