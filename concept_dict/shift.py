"""Shift vectors: how a fine-tuning moved the representations of each concept's samples (arXiv 2501.03012, section 3.2).

    A_k     = rows, of both models, whose largest activation is that of the original's concept k
    delta_m = b_m - a_m                  the same row in the fine-tuned model b and in the original a
    Delta_k = mean of delta_m over A_k   (or the median, or a trimmed mean, coordinate by coordinate)

Sums are float64 and vectors float32, whatever the rows' dtype. A concept without rows has Delta_k = 0 and count 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mm.errors import BadInputError, unknown

Average = Literal["mean", "median", "trimmed"]
AVERAGES = ("mean", "median", "trimmed")


@dataclass(frozen=True)
class Shifts:
    """What a fine-tuning did to each concept's rows.

    Attributes:
        vectors: Delta_k; zeros where there are no rows.
        counts: Rows of A_k.
        pairwise: Consistency: the mean cosine between the delta_m of two different rows. NaN below two rows that moved.
        to_mean: The mean cosine of delta_m with Delta_k. NaN where no row moved, or Delta_k is 0.
        overall: The same average over all rows, in whatever group or none: one shift for all concepts.
    """

    vectors: Float[Tensor, "k d"]
    counts: Int[Tensor, " k"]
    pairwise: Float[Tensor, " k"]
    to_mean: Float[Tensor, " k"]
    overall: Float[Tensor, " d"]

    @property
    def magnitude(self) -> Float[Tensor, " k"]:
        """||Delta_k||."""
        return self.vectors.norm(dim=1)


def main_concept(activations: Float[Tensor, "n k"]) -> Int[Tensor, " n"]:
    """Per row the concept of largest activation; -1 where none is above 0. The first of several that are equal."""
    best = activations.max(dim=1)
    return torch.where(best.values > 0, best.indices, -1)


def movements(original: Float[Tensor, "n d"], tuned: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """delta_m = b_m - a_m in float32.

    Raises:
        BadInputError: If rows are not in pairs, or not finite.
    """
    if original.shape != tuned.shape or original.ndim != 2:
        raise BadInputError(
            f"rows of shapes {tuple(original.shape)} and {tuple(tuned.shape)} are not in pairs; give the same rows (n, "
            "d) of both models, as `pair_rows` finds them"
        )
    for name, rows in (("original", original), ("fine-tuned", tuned)):
        bad = (~rows.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            raise BadInputError(f"row {bad[0]} of the {name} model is not finite; extract it again in a wider dtype")
    return tuned.float() - original.float()


def average(rows: Float[Tensor, "n d"], how: Average = "mean", trim: float = 0.1) -> Float[Tensor, " d"]:
    """The mean of rows, coordinate by coordinate; of no rows zeros.

    Args:
        rows: n > 0 of them.
        how: `"mean"`; `"median"` (of an even number the middle of the two in the middle); `"trimmed"`: the mean without
            the floor(trim n) smallest and as many of the largest, as `scipy.stats.trim_mean`.
        trim: The share that is left out at each end, below 1/2.

    Raises:
        BadInputError: For an unknown average or share.
    """
    if how not in AVERAGES:
        raise unknown("average", how, AVERAGES)
    if not 0 <= trim < 0.5:
        raise BadInputError(f"trim={trim}; the share that is left out at each end must be from 0 to below 1/2")
    if not len(rows):
        return rows.new_zeros(rows.shape[1], dtype=torch.float32)
    if how == "mean":
        return rows.double().mean(dim=0).float()
    out = (len(rows) - 1) // 2 if how == "median" else int(trim * len(rows))
    ranked = rows.double().sort(dim=0).values
    return ranked[out : len(rows) - out].mean(dim=0).float()


def shift_vectors(
    deltas: Float[Tensor, "n d"],
    concept: Int[Tensor, " n"],
    k: int,
    how: Average = "mean",
    trim: float = 0.1,
) -> Shifts:
    """Delta_k with its consistency.

    Args:
        deltas: delta_m, see `movements`.
        concept: The concept that each row belongs to, -1 for none; see `main_concept`.
        k: Number of concepts.
        how: See `average`.
        trim: See `average`.

    Raises:
        BadInputError: If there is not one concept per row, or a number is none of the concepts'.
    """
    if concept.shape != deltas.shape[:1]:
        raise BadInputError(f"{len(deltas)} rows, but concepts of shape {tuple(concept.shape)}; give one per row")
    wrong = concept[(concept < -1) | (concept >= k)].tolist()
    if wrong:
        raise BadInputError(f"a row belongs to concept {wrong[0]}, but there are {k}")
    groups = [deltas[concept == number] for number in range(k)]
    vectors = torch.stack([average(group, how, trim) for group in groups])
    pairs = zip(groups, vectors, strict=True)
    consistency = torch.tensor([_consistency(group, vector) for group, vector in pairs]).reshape(k, 2)
    counts = torch.tensor([len(group) for group in groups])
    return Shifts(vectors, counts, consistency[:, 0], consistency[:, 1], average(deltas, how, trim))


def _consistency(deltas: Float[Tensor, "n d"], vector: Float[Tensor, " d"]) -> tuple[float, float]:
    """Mean pairwise cosine, and mean cosine with the vector, of those that moved."""
    wide = deltas.double()
    norms = wide.norm(dim=1)
    units = wide[norms > 0] / norms[norms > 0, None]
    n, total = len(units), units.sum(dim=0)
    # The squared sum of units holds every pair of different rows twice, and every row with itself once.
    pairwise = float((total.square().sum() - n) / (n * (n - 1))) if n > 1 else float("nan")
    length = float(vector.double().norm())
    to_mean = float(total @ vector.double()) / (n * length) if n and length else float("nan")
    return pairwise, to_mean
