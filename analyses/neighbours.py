"""Exact nearest neighbours of many wide rows in little memory, and rows that are there twice.

Distances are first bounded from below by float32 products of centred rows, block against block (each pair of blocks
once, for both). With |error of q k| <= kappa / 2 (|q|^2 + |k|^2), kappa the rounding bound of the product,

    d(q, k)^2 >= (1 - kappa) (|q|^2 + |k|^2) - 2 q k.

The rows with the smallest bounds are candidates; their distances are computed in float64 from differences, which have
no cancellation. Where the k-th of them lies below every bound that was not kept, no other row can be nearer: the
answer is proven. The few rows where it is not go through float64 products, and what is left through all differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from hooked_mm.errors import BadInputError

BLOCK = 2048
"""Rows in a block; a block of bounds takes 17 MB, a block of rows as float32 8 KB x width."""

SPARE = 6
"""Candidates besides the k that are asked for."""

EXACT_NUMBERS = 2**22
"""Differences held at a time: 32 MB of them."""

ALIKE = 1e-9
"""Rows whose projections differ by less, relative to the largest row, are compared in full for duplicates."""


class Rows(Protocol):
    """A tensor, or anything that gives rows by a slice or by indices, so that not all need be in memory."""

    def __len__(self) -> int:
        """n."""

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Some rows, (m, d)."""


@dataclass(frozen=True)
class Neighbours:
    """Nearest neighbours of every row among the others.

    Attributes:
        distances: (n, k), Euclidean, ascending.
        indices: (n, k), into the rows.
        widened: Rows whose neighbours took float64 products to be certain of.
    """

    distances: Float64[Tensor, "n k"]
    indices: Int[Tensor, "n k"]
    widened: int = 0


@dataclass(frozen=True)
class Distinct:
    """Rows without those that are there already.

    Attributes:
        kept: (m,), indices of the first of each set of equal rows, ascending.
        duplicates: How many were left out, n - m.
    """

    kept: Int[Tensor, " m"]
    duplicates: int


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _mean(rows: Rows) -> tuple[Float64[Tensor, " d"], float]:
    """Their mean, and the mean of their norms about it."""
    blocks = _blocks(len(rows), BLOCK)
    mean = torch.stack([rows[block].sum(0, dtype=torch.float64) for block in blocks]).sum(0) / len(rows)
    norms = sum(float((rows[block].double() - mean).norm(dim=1).sum()) for block in blocks)
    if not norms < float("inf"):
        raise BadInputError(
            "some rows are not finite, or too large for float64, and have no neighbours; leave them out"
        )
    return mean, norms / len(rows)


def distinct(rows: Rows, tolerance: float = 0.0) -> Distinct:
    """Which rows are left when of equal ones only the first is kept.

    Rows that lie within the tolerance of one another have projections within it on any unit vector. So rows are sorted
    by a projection, and compared in full only with those next to them.

    Args:
        rows: (n, d), of any floating dtype; n > 0.
        tolerance: Rows count as equal up to this distance, relative to the mean norm of centred rows. 0: if all their
            numbers are. The same token in the same context (a first token, padding) comes out of other batches with
            other roundings: about 1e-6 in float32, 1e-2 in bfloat16.

    Raises:
        BadInputError: If there are no rows, the tolerance is negative, or rows are not finite.
    """
    if not len(rows) or tolerance < 0:
        raise BadInputError(f"{len(rows)} rows, tolerance={tolerance}; give rows, and a tolerance >= 0")
    mean, size = _mean(rows)
    direction = torch.randn(len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(mean)
    direction /= direction.norm()
    projected = torch.cat([(rows[block].double() - mean) @ direction for block in _blocks(len(rows), BLOCK)])
    width = tolerance * size
    ordered, order = projected.sort()
    # Projections carry roundings, in the size of the mean and of the rows themselves.
    near = width + ALIKE * max(float(projected.abs().max()), size, float(mean.norm()))
    ends = (ordered.diff() > near).nonzero()[:, 0].add(1).tolist()
    kept = torch.ones(len(rows), dtype=torch.bool, device=mean.device)
    for start, stop in zip([0, *ends], [*ends, len(rows)], strict=True):
        left = order[start:stop].sort().values
        while len(left) > 1:
            first = rows[left[:1]].double()
            # A norm of tiny differences may be 0, or of large ones too coarse: equal numbers are asked for as such.
            order_of_norm = 2 if width else torch.inf
            parts = _blocks(len(left), BLOCK)
            apart = torch.cat([(rows[left[part]].double() - first).norm(order_of_norm, dim=1) for part in parts])
            same = apart <= width
            kept[left[same]] = False
            kept[left[0]] = True
            left = left[~same]
    return Distinct(kept.nonzero()[:, 0], len(rows) - int(kept.sum()))


@dataclass(frozen=True)
class _Frame:
    """Rows about their mean, in units of their mean norm."""

    rows: Rows
    mean: Tensor
    size: float

    def read(self, index: slice | Tensor) -> Float64[Tensor, "m d"]:
        return (self.rows[index].double() - self.mean) / self.size


class _Candidates:
    """Per row the smallest lower bounds of squared distances so far, and of which rows."""

    def __init__(self, count: int, size: int, like: Tensor) -> None:
        self.bounds = torch.full((count, size), torch.inf, dtype=like.dtype, device=like.device)
        self.indices = torch.zeros(count, size, dtype=torch.long, device=like.device)

    def take(self, rows: slice, bounds: Tensor, first: int) -> None:
        """New bounds (m, b) of the rows of a slice, to the rows from `first` on."""
        size = self.bounds.shape[1]
        best = bounds.topk(min(size, bounds.shape[1]), dim=1, largest=False, sorted=False)
        both = torch.cat([self.bounds[rows], best.values], 1)
        found = torch.cat([self.indices[rows], best.indices + first], 1)
        self.bounds[rows], places = both.topk(size, dim=1, largest=False)
        self.indices[rows] = found.gather(1, places)


COARSER = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-6}
"""What torch's setting of float32 products adds to their relative error: factors rounded to TF32, or to bfloat16."""


def _kappa(width: int, dtype: torch.dtype) -> float:
    """Twice the bound of the relative error of a product of `width` terms, rows rounded to the dtype first."""
    coarser = COARSER[torch.get_float32_matmul_precision()] if dtype == torch.float32 else 0.0
    return (width + 8) * torch.finfo(dtype).eps + coarser


def nearest(rows: Rows, k: int = 2) -> Neighbours:
    """The k nearest other rows of every row, by exact Euclidean distances.

    Args:
        rows: (n, d), of any floating dtype, distinct or not (a copy is a neighbour at distance 0).
        k: Less than n.

    Raises:
        BadInputError: If there are not more than k rows, or rows are not finite.
    """
    if not 1 <= k < len(rows):
        raise BadInputError(f"k={k} nearest of {len(rows)} rows; k must be 1 at least and less than the rows")
    mean, size = _mean(rows)
    # Of norm 1 on average, float32 holds their squares.
    frame = _Frame(rows, mean, size or 1.0)
    blocks = _blocks(len(rows), BLOCK)
    found = _Candidates(len(rows), min(k + SPARE, len(rows) - 1), mean.float())
    kappa = _kappa(len(mean), torch.float32)
    for number, block in enumerate(blocks):
        one = frame.read(block).float()
        squares = one.double().square().sum(1).mul(1 - kappa).float()
        for other in blocks[number:]:
            two = one if other is block else frame.read(other).float()
            squares_two = squares if other is block else two.double().square().sum(1).mul(1 - kappa).float()
            bounds = torch.addmm(squares_two.expand(len(one), -1), one, two.T, alpha=-2).add_(squares[:, None])
            if other is block:
                bounds.fill_diagonal_(torch.inf)
            else:
                found.take(other, bounds.T, block.start)
            found.take(block, bounds, other.start)
    distances, indices, sure = _exact(frame, torch.arange(len(rows), device=mean.device), found, k)
    unsure = (~sure).nonzero()[:, 0]
    for start in range(0, len(unsure), BLOCK // 4):
        part = unsure[start : start + BLOCK // 4]
        distances[part], indices[part] = _widened(frame, part, k)
    return Neighbours(distances, indices, len(unsure))


def _exact(frame: _Frame, which: Tensor, found: _Candidates, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distances and indices of the k nearest candidates of some rows, and whether no other row can be nearer."""
    rows, candidates = frame.rows, found.indices.shape[1]
    distances, indices, sure = [], [], []
    for part in _blocks(len(which), max(1, EXACT_NUMBERS // max(1, candidates * len(frame.mean)))):
        near = found.indices[part]
        apart = rows[near.flatten()].double().view(*near.shape, -1) - rows[which[part]].double()[:, None]
        best = apart.norm(dim=2).topk(k, dim=1, largest=False)
        distances.append(best.values)
        indices.append(near.gather(1, best.indices))
        # With all other rows among the candidates there is none to be missed.
        farthest = found.bounds[part].amax(1).double() if candidates < len(rows) - 1 else torch.inf
        sure.append((best.values[:, -1] / frame.size).square() <= farthest)
    return torch.cat(distances), torch.cat(indices), torch.cat(sure)


def _widened(frame: _Frame, which: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same of rows that float32 was too coarse for."""
    rows, kappa = frame.rows, _kappa(len(frame.mean), torch.float64)
    found = _Candidates(len(which), min(k + 4 * SPARE, len(rows) - 1), frame.mean)
    one = frame.read(which)
    for block in _blocks(len(rows), BLOCK):
        two = frame.read(block)
        bounds = (1 - kappa) * (one.square().sum(1)[:, None] + two.square().sum(1)) - 2 * one @ two.T
        own = (which >= block.start) & (which < block.stop)
        bounds[own.nonzero()[:, 0], which[own] - block.start] = torch.inf
        found.take(slice(None), bounds, block.start)
    distances, indices, sure = _exact(frame, which, found, k)
    for row in (~sure).nonzero()[:, 0].tolist():
        here = rows[which[row : row + 1]].double()
        step = max(1, EXACT_NUMBERS // len(frame.mean))
        apart = torch.cat([(rows[block].double() - here).norm(dim=1) for block in _blocks(len(rows), step)])
        apart[which[row]] = torch.inf
        best = apart.topk(k, largest=False)
        distances[row], indices[row] = best.values, best.indices
    return distances, indices


def row_hashes(rows: Float[Tensor, "m d"]) -> Int[Tensor, " m"]:
    """A number per row, the same for equal rows and, but for one chance in 10^9 a pair, for no others.

    Integers only, so that it does not depend on a row's place: copies are counted over chunks and processes by it.
    """
    # Adding 0 makes -0 a 0. What fits into float32 is hashed as such.
    bits = (
        (rows.detach().to(torch.promote_types(rows.dtype, torch.float32)) + 0.0).contiguous().view(torch.int32).long()
    )
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (2, bits.shape[1]), generator=generator).to(bits.device) * 2 + 1
    mixed = bits * odd[0]
    return ((mixed ^ (mixed >> 29)) * odd[1]).sum(1)
