"""How a module's tensor is shown in the shape that a hook point's name promises, and a value of it put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass
class Pass:
    """One forward pass of a trace.

    Attributes:
        get: Module path -> nnsight's envoy.
        length: Positions per sample that this pass computes.
        memo: What earlier points of this pass left for later ones.
    """

    get: Callable[[str], Any]
    length: int
    memo: dict[str, Any] = field(default_factory=dict)


class View(Protocol):
    """Shows a module's tensor in another shape, and puts a value of that shape back."""

    def show(self, whole: Tensor, run: Pass) -> Tensor:
        """The value in the promised shape."""

    def back(self, new: Tensor, whole: Tensor) -> Tensor:
        """The module's tensor with this value in it."""


@dataclass(frozen=True)
class Plain:
    """As it is; tensors whose positions were flattened, (b * p, d), become (b, p, d) when `positions` says so.

    A list of tensors, one per image, is shown as one, (tokens of all images, d).
    """

    positions: bool = False

    def show(self, whole: Any, run: Pass) -> Tensor:
        if isinstance(whole, list):
            return torch.cat(whole)
        return whole.unflatten(0, (-1, run.length)) if self.positions and whole.ndim == 2 else whole

    def back(self, new: Tensor, whole: Any) -> Any:
        if isinstance(whole, list):
            return list(new.split([len(part) for part in whole]))
        return new.reshape(whole.shape)


@dataclass(frozen=True)
class Heads:
    """(..., heads * d_head) shown as (..., heads, d_head)."""

    heads: int

    def show(self, whole: Tensor, run: Pass) -> Tensor:
        return whole.unflatten(-1, (self.heads, -1))

    def back(self, new: Tensor, whole: Tensor) -> Tensor:
        return new.flatten(-2)


@dataclass(frozen=True)
class Fused:
    """One of the three of a fused projection, (..., (heads + 2 * kv_heads) * d_head), shown as (..., heads, d_head).

    All queries come first, then all keys, then all values; `by_head`: each head's three are together.
    """

    index: int
    heads: int
    kv_heads: int
    by_head: bool = False

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Queries, keys and values, (..., heads or kv_heads, d_head) each."""
        if self.by_head:
            return list(whole.unflatten(-1, (self.heads, 3, -1)).unbind(dim=-2))
        each = whole.unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        return list(each.split([self.heads, self.kv_heads, self.kv_heads], dim=-2))

    def show(self, whole: Tensor, run: Pass) -> Tensor:
        return self.parts(whole)[self.index]

    def back(self, new: Tensor, whole: Tensor) -> Tensor:
        parts = self.parts(whole)
        parts[self.index] = new
        if self.by_head:
            return torch.stack(parts, dim=-2).flatten(-3)
        return torch.cat(parts, dim=-2).flatten(-2)


@dataclass(frozen=True)
class GatedHeads:
    """Each head's query with its gate behind it, (..., heads * 2 * d_head), the query shown as (..., heads, d_head)."""

    heads: int

    def halves(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and gates."""
        query, gate = whole.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)
        return query, gate

    def show(self, whole: Tensor, run: Pass) -> Tensor:
        return self.halves(whole)[0]

    def back(self, new: Tensor, whole: Tensor) -> Tensor:
        return torch.cat([new, self.halves(whole)[1]], dim=-1).flatten(-2)


@dataclass(frozen=True)
class Half:
    """The first or second half of a fused pair of projections, (..., 2 * d) shown as (..., d)."""

    index: int

    def show(self, whole: Tensor, run: Pass) -> Tensor:
        return whole.chunk(2, dim=-1)[self.index]

    def back(self, new: Tensor, whole: Tensor) -> Tensor:
        halves = list(whole.chunk(2, dim=-1))
        halves[self.index] = new
        return torch.cat(halves, dim=-1)


@dataclass(frozen=True)
class Map:
    """A map (n, d, rows, cols) shown as (n, rows * cols, d)."""

    def show(self, whole: Tensor, run: Pass) -> Tensor:
        return whole.flatten(2).transpose(1, 2)

    def back(self, new: Tensor, whole: Tensor) -> Tensor:
        return new.transpose(1, 2).reshape(whole.shape)


@dataclass(frozen=True)
class OnGrid:
    """A tower's value whose places lie in a grid or window, (n, rows, cols, ...), row by row; others as they are."""

    view: View

    def show(self, whole: Any, run: Pass) -> Tensor:
        return self.view.show(whole.flatten(1, 2) if _in_a_grid(whole) else whole, run)

    def back(self, new: Tensor, whole: Any) -> Any:
        if not _in_a_grid(whole):
            return self.view.back(new, whole)
        return self.view.back(new, whole.flatten(1, 2)).reshape(whole.shape)


def _in_a_grid(whole: Any) -> bool:
    """Whether a value is (n, rows, cols, ...), and no list with a tensor per image."""
    return isinstance(whole, Tensor) and whole.ndim == 4


@dataclass(frozen=True)
class Tiles:
    """(b, images, tiles, p, d) shown as (b * images, tiles * p, d); without tiles, as it is."""

    def show(self, whole: Tensor, run: Pass) -> Tensor:
        return whole if whole.ndim < 5 else whole.flatten(2, 3).flatten(0, 1)

    def back(self, new: Tensor, whole: Tensor) -> Tensor:
        return new.reshape(whole.shape)


@dataclass(frozen=True)
class Streams:
    """Streams that are all alike, (b, p, streams, d) or (b, p, streams * d), shown as one, (b, p, d)."""

    count: int

    def show(self, whole: Tensor, run: Pass) -> Tensor:
        return (whole if whole.ndim > 3 else whole.unflatten(-1, (self.count, -1)))[..., 0, :]

    def back(self, new: Tensor, whole: Tensor) -> Tensor:
        spread = new.unsqueeze(-2).expand(*new.shape[:-1], self.count, new.shape[-1])
        return spread.reshape(whole.shape).contiguous()


@dataclass(frozen=True)
class ByHead:
    """Patterns (b * heads, q, k) shown as (b, heads, q, k), as they are if they are that."""

    heads: int

    def show(self, whole: Tensor, run: Pass) -> Tensor:
        return whole.unflatten(0, (-1, self.heads)) if whole.ndim == 3 else whole

    def back(self, new: Tensor, whole: Tensor) -> Tensor:
        return new.reshape(whole.shape)


@dataclass(frozen=True)
class Swapped:
    """(b, heads, p, d_head) shown as (b, p, heads, d_head)."""

    def show(self, whole: Tensor, run: Pass) -> Tensor:
        return whole.transpose(1, 2)

    def back(self, new: Tensor, whole: Tensor) -> Tensor:
        return new.transpose(1, 2)


PLAIN = Plain()
