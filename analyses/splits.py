"""Samples dealt out to training, validation and test, so that no two of them share a picture.

Rows of one image hold the same objects, so a probe that saw some of them in training knows the answer for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hooked_mm.errors import BadInputError

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


def joined(
    count: int, one: Int[np.ndarray, " m"] | Sequence[int], other: Int[np.ndarray, " m"] | Sequence[int]
) -> Int[np.ndarray, " n"]:
    """Groups of samples that must stay together, because they are tied to each other directly or through others.

    Args:
        count: Number of samples n.
        one: Per tie, a sample.
        other: The sample that it shares something with.

    Returns:
        Per sample, the number of its group.
    """
    ties = coo_array((np.ones(len(one)), (np.asarray(one, int), np.asarray(other, int))), shape=(count, count))
    return connected_components(ties, directed=False)[1].astype(int)


def deal_out(
    groups: Int[np.ndarray, " n"], shares: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0
) -> dict[Part, Bool[np.ndarray, " n"]]:
    """Which samples are for training, which for choosing the penalty and which for scores.

    Args:
        groups: Per sample its group (see `joined`); groups stay whole.
        shares: Of the groups, for training, validation and test.
        seed: Of the shuffling.

    Raises:
        BadInputError: If the shares are not three that make up 1, or one of the parts would be empty.
    """
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise BadInputError(f"shares={list(shares)}; give three above 0 that make up 1: training, validation, test")
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    stops = np.rint(np.cumsum((0.0, *shares)) * len(names)).astype(int)
    if (np.diff(stops) == 0).any():
        raise BadInputError(
            f"{len(names)} samples with pictures of their own can't be dealt out as {list(shares)}: one part would be "
            "empty; take more samples"
        )
    return {part: np.isin(groups, names[a:b]) for part, a, b in zip(PARTS, stops[:-1], stops[1:], strict=True)}
