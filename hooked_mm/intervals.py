"""Bootstrap intervals of means over samples.

Percentile bootstrap (Efron 1979; Efron and Tibshirani 1993, chapter 13): of n samples, n are drawn with replacement,
many times; the interval holds the middle `level` of the means of the draws. All settings share the draws, so that
intervals of two settings on the same samples move together, and that of their difference is that of the differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hooked_mm.errors import BadInputError

CHUNK = 2**23
"""Numbers drawn at a time, which bounds the memory: 64 MB of them."""


class Interval(NamedTuple):
    """The mean, and the lower and upper end of its interval, per setting; NaN for a setting without any value."""

    estimate: Float64[Tensor, "*s"]
    low: Float64[Tensor, "*s"]
    high: Float64[Tensor, "*s"]


def times_drawn(samples: int, draws: int, seed: int) -> Iterator[Float64[Tensor, "b samples"]]:
    """How often each sample is in each draw, some draws at a time.

    Raises:
        BadInputError: If there are no samples or no draws.
    """
    if samples < 1 or draws < 1:
        raise BadInputError(f"{samples} samples, draws={draws}; a bootstrap needs one of each at least")
    generator, size = torch.Generator().manual_seed(seed), max(1, CHUNK // samples)
    for start in range(0, draws, size):
        drawn = torch.randint(samples, (min(size, draws - start), samples), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.float64)
        yield times.scatter_add_(1, drawn, torch.ones_like(times))


def middle(values: Float64[Tensor, "draws s"], level: float) -> tuple[Float64[Tensor, " s"], Float64[Tensor, " s"]]:
    """The ends of the middle `level` of the draws; those that are NaN do not count."""
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = values.nanquantile(tails, dim=0)
    return low, high


def bootstrap(
    values: Float[Tensor, " n"] | Float[Tensor, "n s"], *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean over samples with its percentile bootstrap interval.

    Args:
        values: A value per sample, or per sample and setting. NaN says that a sample does not count for a setting; it
            is left out of that setting's means only.
        draws: Number of resamples.
        seed: Of the draws: the same seed draws the same samples.
        level: Share of the draws that the interval holds.

    Raises:
        BadInputError: If there are no samples, a value is infinite, or `draws` or `level` are out of range.
    """
    if values.ndim not in (1, 2) or not len(values):
        raise BadInputError(f"values are {tuple(values.shape)}; give at least one sample, as (n,) or (n, settings)")
    if values.isinf().any():
        raise BadInputError("a value is infinite, and so would be every mean; leave it out by making it NaN")
    if draws < 1 or not 0 < level < 1:
        raise BadInputError(f"draws={draws}, level={level}; draws must be 1 at least, the level between 0 and 1")
    wide = values.detach().double().cpu().reshape(len(values), -1)
    counts = ~wide.isnan()
    # Around one of its values, a column of equal values is exactly 0, and its interval has no width.
    first = wide.gather(0, counts.int().argmax(0, keepdim=True))
    apart = torch.where(counts, wide - first, 0)
    # A draw without any sample that counts for a setting has no mean there: 0 / 0.
    means = [first + times @ apart / (times @ counts.double()) for times in times_drawn(len(wide), draws, seed)]
    low, high = middle(torch.cat(means), level)
    estimate = first[0] + apart.sum(0) / counts.sum(0)
    return Interval(*(end.reshape(values.shape[1:]) for end in (estimate, low, high)))
