"""Bootstrap bands by sample of scores that are no means: shares, and estimates on drawn rows.

Rows of one sample are not independent, so samples are drawn, each with all its rows (a block bootstrap; Efron and
Tibshirani 1993, chapter 8). Percentile intervals, from the draws of `hooked_mm.intervals`.

A *share* is sum_s a_s / sum_s b_s over samples s. Scores that a fit maximises are shares once the fit is held fixed:
with A* (or the first principal direction) at its optimum, its change with the samples' weights changes the score to
second order only. So the bands need no refit, and are free of what a refit on drawn samples adds: copies of
samples make any fit look better than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.intervals import Interval, middle, times_drawn


def share(
    parts: Float[Tensor, "samples s"],
    wholes: Float[Tensor, "samples s"],
    *,
    draws: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """sum of parts / sum of wholes over samples, with its interval; all columns share their draws.

    Args:
        parts: Per sample and score its share of the numerator.
        wholes: And of the denominator.
        draws: Number of resamples.
        seed: Of the draws.
        level: Share of the draws that the interval holds.

    Raises:
        BadInputError: If the two differ in shape, or there are no samples or draws.
    """
    if parts.shape != wholes.shape or parts.ndim != 2:
        raise BadInputError(
            f"parts {tuple(parts.shape)} and wholes {tuple(wholes.shape)} must both be (samples, scores)"
        )
    above, below = parts.double().cpu(), wholes.double().cpu()
    drawn = torch.cat([times @ above / (times @ below) for times in times_drawn(len(above), draws, seed)])
    return Interval(above.sum(0) / below.sum(0), *middle(drawn, level))


def of_rows(
    samples: Int[Tensor, " n"] | Int[np.ndarray, " n"],
    estimate: Callable[[Int[Tensor, " m"]], Sequence[float]],
    *,
    draws: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Estimates on the rows of drawn samples, a row as often as its sample was drawn.

    Args:
        samples: Per row its sample.
        estimate: Takes indices of rows, ascending, some of them several times; gives numbers. Where it refuses them
            (`BadInputError`), the draw does not count.
        draws: Number of resamples.
        seed: Of the draws.
        level: Share of the draws that the interval holds.

    Raises:
        BadInputError: If there are no rows or draws, or the estimate refuses all rows as they are.
    """
    _, number = torch.as_tensor(samples).cpu().unique(return_inverse=True)
    whole = estimate(torch.arange(len(number)))
    found = []
    for times in times_drawn(int(number.max()) + 1 if len(number) else 0, draws, seed):
        for one in times:
            rows = torch.arange(len(number)).repeat_interleave(one[number].long())
            try:
                found.append(list(estimate(rows)))
            except BadInputError:
                found.append([float("nan")] * len(whole))
    return Interval(torch.tensor(whole, dtype=torch.float64), *middle(torch.tensor(found, dtype=torch.float64), level))
