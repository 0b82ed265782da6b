"""Rows to decompose: a tensor, or a hook of an activation store; every process holds a share of its own.

Rows are converted to float32 and freed from their mean chunk by chunk, so they may be larger than memory; where they
fit into `HELD_BYTES` they are converted once and held. Rows are never gathered: processes exchange sums over rows, and
the single rows that a concept begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from concept_dict.whitening import whitening
from hooked_mm.errors import BadInputError
from hooked_mm.processes import Processes
from hooked_mm.store import ActivationStore

CHUNK = 16_384
"""Rows converted to float32 at a time, at most."""

CHUNK_NUMBERS = 2**24
"""Numbers converted at a time, at most."""

WIDENED = 512
"""Rows converted to float64 at a time, so that they stay in the cache."""

HELD_BYTES = 1e9
"""Rows that take no more as float32 are converted once and held."""


@dataclass(frozen=True)
class Found:
    """A row of some process, by a value that it has there."""

    value: float
    rank: int
    index: int


def as_rows(values: Tensor | np.ndarray) -> Tensor:
    """Rows as a tensor, (n, d).

    Raises:
        BadInputError: If there are not two dimensions, no rows, or values that are not finite.
    """
    rows = torch.as_tensor(values)
    if rows.ndim != 2 or not len(rows):
        raise BadInputError(f"representations must be (n, d) with n > 0; got shape {tuple(rows.shape)}")
    for start in range(0, len(rows), CHUNK):
        bad = not_finite(rows[start : start + CHUNK])
        if bad:
            raise BadInputError(f"row {start + bad[0]} of the representations is not finite; remove it before fitting")
    return rows


def not_finite(rows: Tensor) -> list[int]:
    """Which rows have values that are not finite."""
    # A finite sum, which takes a fraction of the time, has finite terms; finite terms may still have an infinite sum.
    if bool(rows.sum(dtype=torch.promote_types(rows.dtype, torch.float32)).isfinite()):
        return []
    found: list[int] = (~rows.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    return found


class Rows:
    """A process's rows, as they are.

    Args:
        read: Rows (m, d) of any dtype by a slice or by indices.
        count: How many this process has; it may be none where others have some.
        width: d.
        device: Where arithmetic takes place.
        processes: Those that fit together; alone unless given.
    """

    def __init__(
        self,
        read: Callable[[Any], Tensor],
        count: int,
        width: int,
        device: torch.device | str,
        processes: Processes | None = None,
    ) -> None:
        self._read, self.count, self.width = read, count, width
        self.device, self.processes = torch.device(device), processes or Processes()
        self.total = sum(self.processes.gather(count))
        self._means: dict[bool, Tensor] = {}
        self._sizes: dict[bool, float] = {}
        self._centred: dict[tuple[bool, float], Centred] = {}

    @classmethod
    def of(cls, values: Tensor | np.ndarray | Rows) -> Rows:
        """Of a tensor or an array: in a run of many processes, this process's share.

        Raises:
            BadInputError: See `as_rows`.
        """
        if isinstance(values, Rows):
            return values
        rows = as_rows(values)
        return cls(lambda index: rows[index], len(rows), rows.shape[1], rows.device)

    @classmethod
    def of_store(cls, store: ActivationStore, hook: str, device: torch.device | str = "cpu") -> Rows:
        """Of a hook of a store: this process's share, an unbroken stretch of it.

        Raises:
            BadInputError: If there are no rows, or values that are not finite.
            UnknownHookError: If the store does not hold the hook.
        """
        processes = Processes()
        start, stop = (len(store) * rank // processes.size for rank in (processes.rank, processes.rank + 1))
        width = store.activations(hook, slice(0, 0)).shape[1]
        if not len(store):
            raise BadInputError(f"{store!r} has no rows to learn from")

        def read(index: slice | Tensor) -> Tensor:
            part = np.arange(start, stop)[index.cpu().numpy() if isinstance(index, Tensor) else index]
            return store.activations(hook, part)

        rows = cls(read, stop - start, width, device, processes)
        bad = [start + part.start + row for part, chunk in rows.chunks() for row in not_finite(chunk)]
        bad = [number for part in processes.gather(bad[:1]) for number in part]
        if bad:
            raise BadInputError(f"row {bad[0]} of {hook!r} in {str(store.path)!r} is not finite; make the store again")
        return rows

    def read(self, index: slice | Tensor) -> Float[Tensor, "m d"]:
        """Some rows as float32."""
        return self._read(index).to(self.device, torch.float32)

    def chunks(self) -> Iterator[tuple[slice, Float[Tensor, "m d"]]]:
        """All rows as float32, a chunk at a time."""
        step = max(1, min(CHUNK, CHUNK_NUMBERS // max(1, self.width)))
        for start in range(0, self.count, step):
            part = slice(start, min(start + step, self.count))
            yield part, self.read(part)

    def mean(self, center: bool) -> Float[Tensor, " d"]:
        """What is subtracted: the mean over all processes, or zeros."""
        if center not in self._means:
            mean = torch.zeros(self.width, dtype=torch.float64, device=self.device)
            if center:
                for _, chunk in self.chunks():
                    mean += chunk.sum(0, dtype=torch.float64)
                mean = self.processes.sum(mean) / self.total
            self._means[center] = mean.float()
        return self._means[center]

    def size(self, center: bool) -> float:
        """The sum of squares over all processes, behind the subtraction."""
        if (center, 0.0) in self._centred:
            return self._centred[center, 0.0].size
        if center not in self._sizes:
            size, mean = torch.zeros((), dtype=torch.float64, device=self.device), self.mean(center)
            for _, chunk in self.chunks():
                size += torch.linalg.vector_norm(chunk - mean, dtype=torch.float64).square()
            self._sizes[center] = float(self.processes.sum(size))
        return self._sizes[center]

    def centred(self, center: bool, whiten: float = 0.0) -> Centred:
        """The same minus their mean, or as they are, and whitened; made once."""
        if (center, whiten) not in self._centred:
            self._centred[center, whiten] = Centred(self, center, whiten)
        return self._centred[center, whiten]


class Centred:
    """Rows minus their mean over all processes, whitened if asked for.

    Attributes:
        mean: (d,); zeros where nothing is subtracted.
        whitening: (d, d), by which they are multiplied then (see `whitening`); None where they are not.
        squares: (n,), each row's sum of squares.
        size: Their sum over all processes.
        count: Rows of this process.
        total: Rows of all.
    """

    def __init__(self, rows: Rows, center: bool, whiten: float = 0.0) -> None:
        self.rows, self.center = rows, center
        self.count, self.total, self.width = rows.count, rows.total, rows.width
        self.device, self.processes = rows.device, rows.processes
        self.mean = rows.mean(center)
        self.whitening: Float[Tensor, "d d"] | None = None
        self._held: Tensor | None = None
        if whiten:
            self.whitening = whitening(second_moments(self), whiten)
        if rows.count * rows.width * 4 <= HELD_BYTES:
            # A chunk at a time: copies of all rows on the way would take several times what is held.
            held = torch.empty(rows.count, rows.width, device=rows.device)
            for part, chunk in rows.chunks():
                held[part] = self.changed(chunk)
            self._held = held
        self.squares: Float[Tensor, " n"] = torch.empty(rows.count, device=rows.device)
        size = torch.zeros((), dtype=torch.float64, device=rows.device)
        for part, chunk in self.chunks():
            wide = torch.linalg.vector_norm(chunk, dim=1, dtype=torch.float64).square()
            self.squares[part] = wide.float()
            size += wide.sum()
        self.size = float(rows.processes.sum(size))

    def changed(self, chunk: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Vectors in the space of the rows, without the mean and whitened as these are."""
        chunk = chunk - self.mean if self.center else chunk
        return chunk if self.whitening is None else chunk @ self.whitening

    def chunks(self) -> Iterator[tuple[slice, Float[Tensor, "m d"]]]:
        """This process's rows, a chunk at a time; not to be changed."""
        if self._held is None:
            for part, chunk in self.rows.chunks():
                yield part, self.changed(chunk)
            return
        step = max(1, min(CHUNK, CHUNK_NUMBERS // max(1, self.width)))
        for start in range(0, self.count, step):
            part = slice(start, min(start + step, self.count))
            yield part, self._held[part]

    def take(self, index: Tensor) -> Float[Tensor, "m d"]:
        """Some of this process's rows."""
        return self._held[index] if self._held is not None else self.changed(self.rows.read(index))

    def draw(self, weights: Float[Tensor, " n"], points: Float64[Tensor, " t"]) -> Float[Tensor, "t d"]:
        """Rows of any process, each as probable as its weight, by numbers drawn from 0 to 1; the same in all processes.

        Args:
            weights: Of this process's rows, not negative.
            points: The same in all processes. One point finds the same row whatever number of processes holds the rows.
        """
        sums = weights.double().cumsum(0)
        ends = torch.tensor(self.processes.gather(float(sums[-1]) if self.count else 0.0), dtype=torch.float64).cumsum(
            0
        )
        wanted = points.cpu() * ends[-1]
        owner = torch.searchsorted(ends, wanted, right=True).clamp_max(len(ends) - 1)
        found = torch.zeros(len(points), self.width, device=self.device)
        mine = (owner == self.processes.rank).nonzero()[:, 0]
        if len(mine) and self.count:
            before = float(ends[self.processes.rank] - sums[-1].cpu())
            index = torch.searchsorted(sums, (wanted[mine] - before).to(sums)).clamp_max(self.count - 1)
            found[mine.to(self.device)] = self.take(index)
        return self.processes.sum(found)

    def largest(self, values: Float[Tensor, " n"], count: int) -> list[Found]:
        """The rows of all processes with the largest values, largest first; the same in all processes."""
        best = values.topk(min(count, len(values)))
        own = [
            Found(value, self.processes.rank, index)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        every = [found for part in self.processes.gather(own) for found in part]
        return sorted(every, key=lambda found: (-found.value, found.rank, found.index))[:count]

    def row(self, found: Found) -> Float[Tensor, " d"]:
        """One row, in every process."""
        value = torch.zeros(self.width, device=self.device)
        if found.rank == self.processes.rank:
            value = self.take(torch.tensor([found.index], device=self.device))[0]
        return self.processes.sum(value)


def second_moments(rows: Centred) -> Float64[Tensor, "d d"]:
    """Z^T Z over all processes."""
    total = torch.zeros(rows.width, rows.width, dtype=torch.float64, device=rows.device)
    for _, chunk in rows.chunks():
        wide = chunk.double()
        total += wide.T @ wide
    return rows.processes.sum(total)
