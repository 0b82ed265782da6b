"""Means over rows, with the share that each sample has in them: rows of one sample are not independent."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor


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
