"""How good a dictionary is by itself: what it leaves over, how sparse it is, whether its concepts differ and come back.

Nothing here needs a truth, only rows Z (n, d), concepts C (k, d), activations A (n, k), or the lists that ground the
concepts. What a number is worth shows beside a random dictionary's (see `random_dictionary`).
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hooked_mm.errors import BadInputError

CHUNK = 16_384
"""Rows taken at a time."""


class Fitted(Protocol):
    """What is needed of a fitted dictionary: Z ~ mean + A C."""

    @property
    def components_(self) -> Float[Tensor, "k d"]:
        """C."""

    @property
    def mean_(self) -> Float[Tensor, " d"]:
        """What is subtracted from rows first."""

    def transform(self, X: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """A, the activations of rows."""


@dataclass(frozen=True)
class Reconstruction:
    """How a dictionary represents rows.

    Attributes:
        relative_error: ||Z - mean - A C|| / ||Z - mean||, Frobenius norms, mean as the dictionary has it.
        variance_explained: 1 - ||Z - mean - A C||^2 / ||Z - own mean of the rows||^2; below 0 if worse than that mean.
        sparsity: Mean over rows of the share of concepts that are active, |a| > 0; 1 / k for one concept per row.
        dead: Concepts that are active in no row.
    """

    relative_error: float
    variance_explained: float
    sparsity: float
    dead: Int[np.ndarray, " dead"]


def reconstruction(dictionary: Fitted, rows: Float[Tensor, "n d"]) -> Reconstruction:
    """Error, variance explained, sparsity and dead concepts on rows, chunk by chunk, sums in float64.

    Args:
        dictionary: Fitted, on these rows or others.
        rows: Of any dtype; more than memory holds as float32 is no problem.

    Raises:
        BadInputError: If there are no rows, or all rows are the dictionary's mean, so that nothing is to be explained.
    """
    if not len(rows):
        raise BadInputError("there are no rows to score the dictionary on; give representations (n, d) with n > 0")
    k, d = dictionary.components_.shape
    left = size = active = 0.0
    total, used = torch.zeros(d, dtype=torch.float64), torch.zeros(k, dtype=torch.bool)
    for start in range(0, len(rows), CHUNK):
        chunk = torch.as_tensor(rows[start : start + CHUNK])
        activations = dictionary.transform(chunk)
        centred = chunk.double() - dictionary.mean_.double()
        left += float((centred - activations.double() @ dictionary.components_.double()).square().sum())
        size += float(centred.square().sum())
        total += centred.sum(dim=0).cpu()
        active += float((activations != 0).sum())
        used |= (activations != 0).any(dim=0).cpu()
    spread = size - float(total.square().sum()) / len(rows)
    if size == 0:
        raise BadInputError("every row is the dictionary's mean, so there is nothing to explain; give other rows")
    return Reconstruction(
        (left / size) ** 0.5,
        1 - left / spread if spread > 1e-12 * size else float("nan"),
        active / (len(rows) * k),
        (~used).nonzero()[:, 0].numpy(),
    )


def folded(items: Collection[Hashable]) -> set[Hashable]:
    """The items, words without their case."""
    return {item.casefold() if isinstance(item, str) else item for item in items}


def overlap(lists: Sequence[Collection[Hashable]]) -> float:
    """Mean over i != j of |T_i n T_j| / |T_i| (CoX-LMM, arXiv 2406.08074): 0 if all differ, 1 if all are the same.

    Args:
        lists: Per concept its words (case does not matter) or its most activating samples.

    Returns:
        NaN with fewer than two lists. Concepts with an empty list have no share of their own to give: as T_i they are
        left out, as T_j they share nothing.
    """
    sets = [folded(entries) for entries in lists]
    shares = [
        len(one & other) / len(one) for i, one in enumerate(sets) if one for j, other in enumerate(sets) if i != j
    ]
    return float(np.mean(shares)) if shares else float("nan")


def cosines(one: Float[Tensor, "k d"], other: Float[Tensor, "m d"]) -> Float[np.ndarray, "k m"]:
    """Between directions; 0 with one of length 0."""
    unit, partner = (torch.nn.functional.normalize(side.detach().double().cpu(), dim=1) for side in (one, other))
    return (unit @ partner.T).numpy()


def matched_cosines(
    one: Float[Tensor, "k d"], other: Float[Tensor, "k d"], *, signed: bool = False
) -> Float[np.ndarray, " k"]:
    """The cosine of every concept of `one` with its partner in `other`, each partner taken once.

    Partners are those of the assignment with the largest sum (the Hungarian method). A concept of norm 0 has cosine 0.

    Args:
        one: Concepts; their norms do not matter.
        other: As many concepts.
        signed: Count a concept and its opposite as the same, by |cosine|.

    Raises:
        BadInputError: If the two differ in shape.
    """
    if one.shape != other.shape:
        raise BadInputError(
            f"dictionaries of shapes {tuple(one.shape)} and {tuple(other.shape)} can't be matched concept by concept; "
            "fit both with the same number of concepts on the same hook point"
        )
    found = cosines(one, other)
    found = np.abs(found) if signed else found
    return found[linear_sum_assignment(found, maximize=True)]


def stability(runs: Sequence[Float[Tensor, "k d"]], *, signed: bool = False) -> float:
    """Mean matched cosine over all pairs of runs: 1 if other seeds (or samples) find the same concepts.

    Args:
        runs: Concepts of each run.
        signed: For methods whose concepts have no sign of their own (PCA); see `matched_cosines`.

    Raises:
        BadInputError: With fewer than two runs, or runs of different shapes.
    """
    if len(runs) < 2:
        raise BadInputError(
            f"stability compares runs with each other, but got {len(runs)}; fit with at least two seeds"
        )
    return float(np.mean([matched_cosines(one, other, signed=signed) for one, other in combinations(runs, 2)]))
