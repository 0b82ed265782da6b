"""Means over rows, with the share that each sample has in them: rows of one sample are not independent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from analyses.result import Score
from hooked_mm.intervals import bootstrap


def mean_scores(
    sums: Mapping[str, Float64[Tensor, "samples layers"]],
    rows: Int[Tensor, " samples"],
    modality: str,
    layers: Sequence[int | None],
    draws: int,
    seed: int,
) -> list[Score]:
    """Means over samples of the mean within each, with bootstrap intervals over samples.

    Args:
        sums: Score -> summed over each sample's rows.
        rows: How many rows each sample has; those with none do not count.
        modality: Of the rows.
        layers: Of the columns.
        draws: Of the bootstrap; 0 for no intervals.
        seed: Of the draws.
    """
    there, found = rows > 0, []
    about = {"rows": int(rows.sum()), "samples": int(there.sum())}
    for name, summed in sums.items():
        bands = bootstrap(summed[there] / rows[there, None], draws=max(1, draws), seed=seed)
        for place, layer in enumerate(layers):
            ends = (float(bands.low[place]), float(bands.high[place])) if draws else (math.nan, math.nan)
            found.append(Score(name, modality, layer, float(bands.estimate[place]), *ends, **about))
    return found


def ratio_by_sample(
    totals: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], samples: Int[np.ndarray, " n"]
) -> Float64[Tensor, " s"]:
    """A value per sample, whose mean is sum totals / sum weights, and whose bootstrap is that over samples.

    A sample with more weight counts more in a ratio of sums. To first order its part in it is
    S (total - ratio weight) / all weights, S the number of samples (the infinitesimal jackknife, Efron 1982).

    Args:
        totals: Per row what is summed up.
        weights: Per row what it is divided by: 1 for a mean over rows.
        samples: Per row its sample.
    """
    _, places = np.unique(samples, return_inverse=True)
    above, below = np.bincount(places, totals), np.bincount(places, weights)
    ratio = above.sum() / below.sum()
    return torch.from_numpy(ratio + len(above) * (above - ratio * below) / below.sum())
