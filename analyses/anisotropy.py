"""How unevenly representations fill their space: two measures that share a name in the literature.

`anisotropy` (LLM-Microscope; Razzhigaev et al. 2024, arXiv 2311.05928): the share of variance along the first
principal direction,  s_1^2 / sum_i s_i^2  with s the singular values of the *centred* rows; 1 / d if all directions
are alike, 1 on a line. `mean_cosine` (Ethayarajh 2019, D19-1006): the mean cosine of pairs of different rows, *not*
centred; 0 if directions are uniform, 1 if all are the same. Over all pairs it needs no pair, with u_i = x_i / ||x_i||:

    (||sum_i u_i||^2 - n) / (n (n - 1))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from analyses.moments import CHUNK_NUMBERS, Moments, Sums, moments
from hooked_mm.errors import BadInputError


def principal(of: Moments) -> tuple[float, Float64[Tensor, " d"]]:
    """Anisotropy, and the first principal direction (of either sign), from moments.

    Raises:
        BadInputError: If the rows do not vary.
    """
    spread = float(of.spread)
    if not spread > 0:
        raise BadInputError(f"the {of.n:g} rows do not vary, so no direction is their first; give other rows")
    values, vectors = torch.linalg.eigh(of.scatter)
    return float(values[-1]) / spread, vectors[:, -1]


def anisotropy(rows: Float[Tensor, "n d"]) -> float:
    """s_1^2 / sum s_i^2 of the centred rows, between 1 / min(n - 1, d) and 1.

    Raises:
        BadInputError: If the rows are not (n, d), are not finite, or do not vary.
    """
    if rows.ndim != 2 or len(rows) >= rows.shape[1]:
        return principal(moments(rows))[0]
    # Of few rows the products of rows have the same eigenvalues as those of columns, which are many more.
    wide = rows.detach().double()
    wide = wide - wide.mean(0)
    gram = wide @ wide.T
    spread = float(gram.diagonal().sum())
    if not math.isfinite(spread):
        raise BadInputError("some rows have values that are not finite or too large; leave them out")
    if not spread > 0:
        raise BadInputError(f"the {len(rows)} rows do not vary, so no direction is their first; give other rows")
    return float(torch.linalg.eigvalsh(gram)[-1]) / spread


@dataclass(frozen=True)
class UnitSum:
    """The sum of rows divided by their norms, mergeable.

    Attributes:
        n: Rows that count.
        total: (d,).
        zeros: Rows of norm 0, which have no direction and are left out.
    """

    n: int
    total: Float64[Tensor, " d"]
    zeros: int = 0

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> UnitSum:
        """Of rows of any floating dtype.

        Raises:
            BadInputError: If a value is not finite.
        """
        total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        zeros, step = 0, max(1, CHUNK_NUMBERS // max(rows.shape[1], 1))
        for start in range(0, len(rows), step):
            units = unit(rows[start : start + step])
            zeros += int((units == 0).all(1).sum())
            total += units.sum(0)
        if not bool(total.isfinite().all()):
            raise BadInputError("some rows are not finite and have no direction; leave them out")
        return cls(len(rows) - zeros, total, zeros)

    def __add__(self, other: UnitSum) -> UnitSum:
        """Of the rows of both."""
        return UnitSum(self.n + other.n, self.total + other.total, self.zeros + other.zeros)

    def reduce(self, processes: Sums) -> UnitSum:
        """Of the rows of all processes."""
        n, zeros = processes.sum(torch.tensor([self.n, self.zeros], device=self.total.device)).tolist()
        return UnitSum(n, processes.sum(self.total), zeros)

    def mean_cosine(self) -> float:
        """Over all pairs of different rows.

        Raises:
            BadInputError: If fewer than two rows count.
        """
        if self.n < 2:
            raise BadInputError(f"a mean cosine needs two rows that are not zero; got {self.n} (and {self.zeros} zero)")
        return float(self.total.square().sum() - self.n) / (self.n * (self.n - 1))


def unit(rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
    """Rows of norm 1; those of norm 0 stay as they are."""
    wide = rows.double()
    norms = wide.norm(dim=1, keepdim=True)
    return wide / torch.where(norms > 0, norms, 1)


def mean_cosine(rows: Float[Tensor, "n d"], *, size: int | None = None, seed: int = 0) -> float:
    """Ethayarajh's anisotropy: the mean cosine of two different rows.

    Args:
        rows: Of any floating dtype; zero rows are left out (`UnitSum.of` counts them).
        size: Over the pairs of so many rows only, drawn without replacement, as the source does (1,000 there): what
            it found is comparable at the same size only in its noise, not in its mean. None takes all rows, exactly.
        seed: Of the draw.

    Raises:
        BadInputError: If there are fewer rows than `size`, or fewer than two that are not zero.
    """
    if size is not None:
        if not 2 <= size <= len(rows):
            raise BadInputError(f"size={size}, but a baseline takes two rows at least and all {len(rows)} at most")
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:size]
        rows = rows[drawn.to(rows.device)]
    return UnitSum.of(rows).mean_cosine()
