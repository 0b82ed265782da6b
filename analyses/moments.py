"""Mergeable sums of rows: counts, means and scatter matrices, added up chunk by chunk in float64.

Of rows x_i (n, d):  mean = sum x_i / n,  scatter = sum (x_i - mean)(x_i - mean)^T  (the Gram matrix of centred rows).
Of pairs (x_i, y_i) besides:  cross = sum (x_i - mean)(y_i - mean_y)^T  and  spread_y = sum ||y_i - mean_y||^2.

Two parts a, b are merged by Chan, Golub and LeVeque (1983):  scatter = scatter_a + scatter_b + n_a n_b / n D D^T,
D = mean_b - mean_a, which loses nothing to a mean far from the origin, as a difference of raw sums would. So rows
need not fit into memory, and any weighting of groups (folds, a bootstrap by sample) is had from the groups' sums
without another pass over the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from hooked_mm.errors import BadInputError

CHUNK_NUMBERS = 2**22
"""Numbers converted to float64 at a time: 32 MB of them."""

BLOCKS = 8
"""Into so many bands the scatter matrix is cut, of which only the upper triangle's are computed."""


class Sums(Protocol):
    """What adds a tensor up over processes that work together (`hooked_mm.processes.Processes`)."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, the same in all of them."""


@dataclass(frozen=True)
class Moments:
    """Of rows.

    Attributes:
        n: Rows, or the sum of their weights.
        mean: (d,).
        scatter: (d, d), centred.
    """

    n: float
    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]

    @property
    def spread(self) -> Float64[Tensor, ""]:
        """sum ||x_i - mean||^2, the trace of the scatter."""
        return self.scatter.diagonal().sum()

    def __add__(self, other: Moments) -> Moments:
        """Of the rows of both."""
        return combine([self, other])

    def reduce(self, processes: Sums) -> Moments:
        """Of the rows of all processes; one that has none must know the width."""
        n = float(processes.sum(torch.tensor(self.n, dtype=torch.float64, device=self.mean.device)))
        mean = processes.sum(self.n * self.mean) / max(n, 1)
        apart = self.mean - mean
        return Moments(n, mean, processes.sum(torch.addr(self.scatter, apart, apart, alpha=self.n)))


@dataclass(frozen=True)
class PairMoments:
    """Of pairs of rows.

    Attributes:
        x: Of the first of each pair, (n, d).
        mean_y: (e,), of the second.
        cross: (d, e), centred.
        spread_y: (), sum ||y_i - mean_y||^2; of y's own scatter no more is needed.
    """

    x: Moments
    mean_y: Float64[Tensor, " e"]
    cross: Float64[Tensor, "d e"]
    spread_y: Float64[Tensor, ""]

    @property
    def n(self) -> float:
        """Pairs, or the sum of their weights."""
        return self.x.n

    def __add__(self, other: PairMoments) -> PairMoments:
        """Of the pairs of both."""
        return combine([self, other])

    def difference(self) -> PairMoments:
        """Of the pairs (x_i, y_i - x_i); of 16 digits those are lost that y - x is smaller than x, squared.

        Raises:
            BadInputError: If the two differ in width.
        """
        if self.mean_y.shape != self.x.mean.shape:
            raise BadInputError(
                f"y - x needs rows of one width, but x has {len(self.x.mean)} and y {len(self.mean_y)} numbers; "
                "take two points of one residual stream"
            )
        spread = self.spread_y - 2 * self.cross.diagonal().sum() + self.x.spread
        return PairMoments(self.x, self.mean_y - self.x.mean, self.cross - self.x.scatter, spread)

    def reduce(self, processes: Sums) -> PairMoments:
        """Of the pairs of all processes; one that has none must know the widths."""
        x = self.x.reduce(processes)
        mean_y = processes.sum(self.n * self.mean_y) / max(x.n, 1)
        apart, apart_y = self.x.mean - x.mean, self.mean_y - mean_y
        cross = processes.sum(torch.addr(self.cross, apart, apart_y, alpha=self.n))
        return PairMoments(x, mean_y, cross, processes.sum(self.spread_y + self.n * apart_y.square().sum()))


AnyMoments = TypeVar("AnyMoments", Moments, PairMoments)


def combine(parts: Sequence[AnyMoments], weights: Sequence[float] | None = None) -> AnyMoments:
    """Of the rows of all parts, each part's rows counted `weights` times.

    Args:
        parts: At least one.
        weights: Per part, not negative: 0 leaves a fold out, counts of drawn groups make a bootstrap. 1 unless given.

    Raises:
        BadInputError: If there are no parts, the weights do not fit, or are negative.
    """
    times = [1.0] * len(parts) if weights is None else [float(weight) for weight in weights]
    if not parts or len(times) != len(parts) or min(times) < 0:
        raise BadInputError(f"{len(parts)} parts with weights {times[:5]}; give a weight >= 0 to each of at least one")
    first = parts[0]
    if isinstance(first, Moments):
        return _combined([part for part in parts if isinstance(part, Moments)], times)
    pairs = [part for part in parts if isinstance(part, PairMoments)]
    x = _combined([pair.x for pair in pairs], times)
    shares = [weight * pair.n / max(x.n, 1e-300) for weight, pair in zip(times, pairs, strict=True)]
    mean_y = torch.stack([share * pair.mean_y for share, pair in zip(shares, pairs, strict=True)]).sum(0)
    cross, spread = torch.zeros_like(first.cross), torch.zeros_like(first.spread_y)
    for weight, pair in zip(times, pairs, strict=True):
        apart_y = pair.mean_y - mean_y
        cross.add_(pair.cross, alpha=weight).addr_(pair.x.mean - x.mean, apart_y, alpha=weight * pair.n)
        spread += weight * (pair.spread_y + pair.n * apart_y.square().sum())
    return PairMoments(x, mean_y, cross, spread)


def _combined(parts: Sequence[Moments], times: Sequence[float]) -> Moments:
    n = sum(weight * part.n for weight, part in zip(times, parts, strict=True))
    mean = torch.zeros_like(parts[0].mean)
    for weight, part in zip(times, parts, strict=True):
        mean.add_(part.mean, alpha=weight * part.n / max(n, 1e-300))
    scatter = torch.zeros_like(parts[0].scatter)
    for weight, part in zip(times, parts, strict=True):
        apart = part.mean - mean
        scatter.add_(part.scatter, alpha=weight).addr_(apart, apart, alpha=weight * part.n)
    return Moments(n, mean, scatter)


class Running:
    """Adds rows, or pairs of rows, up as they come.

    Args:
        width: d, of x.
        width_y: Of y, for pairs.
        device: Where the rows are, and the sums are kept.
    """

    def __init__(self, width: int, width_y: int | None = None, device: torch.device | str = "cpu") -> None:
        self._n = 0
        self._mean, self._scatter = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((width,), (width, width))
        )
        self._pairs = width_y is not None
        self._mean_y, self._cross, self._spread_y = (
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((width_y or 0,), (width, width_y or 0), ())
        )

    def add(self, x: Float[Tensor, "m d"], y: Float[Tensor, "m e"] | None = None) -> Running:
        """Take rows of any floating dtype; of pairs both.

        Raises:
            BadInputError: If the shapes do not fit, y is missing or too much, or a value is not finite.
        """
        widths = (len(self._mean), len(self._mean_y) if self._pairs else None)
        got = (x.shape[-1], None if y is None else y.shape[-1])
        if x.ndim != 2 or got != widths or (y is not None and (y.ndim != 2 or len(y) != len(x))):
            shapes = [tuple(rows.shape) for rows in (x, y) if rows is not None]
            raise BadInputError(f"rows of shapes {shapes} do not fit sums of width {widths[0]}, {widths[1]} of y")
        step = max(1, CHUNK_NUMBERS // max(x.shape[1], 1))
        for start in range(0, len(x), step):
            self._merge(x[start : start + step], None if y is None else y[start : start + step])
        return self

    def _merge(self, x: Tensor, y: Tensor | None) -> None:
        fresh = len(x)
        wide, mean = _centred(x)
        share, between = fresh / (self._n + fresh), fresh * self._n / (self._n + fresh)
        apart = mean - self._mean
        _add_gram(self._scatter, wide)
        self._scatter.addr_(apart, apart, alpha=between)
        self._mean.add_(apart, alpha=share)
        if y is not None:
            wide_y, mean_y = _centred(y)
            apart_y = mean_y - self._mean_y
            self._cross.addmm_(wide.T, wide_y).addr_(apart, apart_y, alpha=between)
            self._spread_y += wide_y.square_().sum() + between * apart_y.square().sum()
            self._mean_y.add_(apart_y, alpha=share)
        self._n += fresh

    def moments(self) -> Moments:
        """Of x, as far as it came; a copy."""
        # Below the diagonal only the blocks on it and the merges are there.
        upper = self._scatter.triu()
        return Moments(float(self._n), self._mean.clone(), upper + upper.triu(1).T)

    def pair_moments(self) -> PairMoments:
        """Of pairs, as far as they came; a copy."""
        return PairMoments(self.moments(), self._mean_y.clone(), self._cross.clone(), self._spread_y.clone())


def _centred(rows: Tensor) -> tuple[Float64[Tensor, "m d"], Float64[Tensor, " d"]]:
    wide = rows.detach().double()
    mean = wide.mean(0)
    # A sum, which takes a fraction of the time, is not finite if one of its terms is not.
    if not bool(mean.isfinite().all()):
        bad = (~wide.isfinite().all(1)).nonzero()[:, 0]
        where = f"row {int(bad[0])} of a chunk has" if len(bad) else "the rows' sum leaves float64, so they must have"
        raise BadInputError(f"{where} values that are not finite or too large; leave such rows out")
    return wide - mean, mean


def _add_gram(total: Float64[Tensor, "d d"], rows: Float64[Tensor, "m d"]) -> None:
    """Add rows^T rows to the blocks of the upper triangle."""
    width = rows.shape[1]
    step = max(-(-width // BLOCKS), 64)
    for start in range(0, width, step):
        stop = min(start + step, width)
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def moments(x: Float[Tensor, "n d"]) -> Moments:
    """Of rows, in chunks of 32 MB.

    Raises:
        BadInputError: If they are not (n, d), or a value is not finite.
    """
    if x.ndim != 2:
        raise BadInputError(f"rows must be (n, d); got shape {tuple(x.shape)}")
    return Running(x.shape[1], device=x.device).add(x).moments()


def pair_moments(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"]) -> PairMoments:
    """Of pairs of rows, in chunks of 32 MB.

    Raises:
        BadInputError: If they are not (n, d) and (n, e), or a value is not finite.
    """
    if x.ndim != 2 or y.ndim != 2:
        raise BadInputError(f"rows must be (n, d) and (n, e); got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    return Running(x.shape[1], y.shape[1], x.device).add(x, y).pair_moments()


def grouped_pair_moments(
    chunks: Iterable[tuple[Float[Tensor, "m d"], Float[Tensor, "m e"], Int[Tensor, " m"]]],
    groups: int,
    width: int,
    width_y: int,
    device: torch.device | str = "cpu",
) -> list[PairMoments]:
    """Per group of pairs, in one pass.

    Args:
        chunks: x, y and per pair the number of its group, from 0.
        groups: How many there are; memory is `groups` x 8 d (d + e) bytes.
        width: d.
        width_y: e.
        device: Where the rows are.

    Raises:
        BadInputError: If a group's number is none, or see `Running.add`.
    """
    running = [Running(width, width_y, device) for _ in range(groups)]
    for x, y, group in chunks:
        if len(group) and not 0 <= int(group.min()) <= int(group.max()) < groups:
            raise BadInputError(f"a pair is of group {int(group.max())}, but there are {groups}, counted from 0")
        for number in group.unique().tolist():
            own = (group == number).to(x.device)
            running[number].add(x[own], y[own])
    return [part.pair_moments() for part in running]
