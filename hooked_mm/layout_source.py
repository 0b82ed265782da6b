"""What a layout is read from, what a reader gives, and what readers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mm.layout import Kind, Plan, Tiles

Arrange = Callable[[int, int], Tiles]
"""(number of the image, number of its crops) -> how they are arranged."""


@dataclass(frozen=True)
class Source:
    """What a layout is read from.

    Attributes:
        inputs: The forward tensors.
        image: (b, p) bool, where the image token stands.
        config: The model's configuration.
        counts: How many image positions each image takes, where a processor has said so.
        arrange: How a processor cuts its pictures; without one, only what the tensors tell is known.
        attended: Text reads images by cross-attention.
    """

    inputs: Mapping[str, Tensor]
    image: Bool[Tensor, "b p"]
    config: Any
    counts: Sequence[int] | None = None
    arrange: Arrange | None = None
    attended: bool = False


@dataclass(frozen=True)
class Read:
    """What a reader found; the rest of `Layout` follows from it."""

    kind: Kind
    plans: list[Plan]
    tower_image: Tensor
    facts: dict[str, Any] = field(default_factory=dict)


def pictures(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that hold pictures, by whatever name: of floating point, and neither masks nor embeddings."""
    return {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and not name.endswith(("mask", "masks", "embeds", "bbox"))
    }


def in_row_zero(index: Int[Tensor, "rows cols"]) -> Int[Tensor, "rows cols 2"]:
    """Cells of a packed tower, which has one row."""
    return torch.stack([torch.zeros_like(index), index], dim=-1)


def nothing() -> Int[Tensor, " none"]:
    """No positions."""
    return torch.zeros(0, dtype=torch.long)


def runs_of(row: Bool[Tensor, " p"]) -> list[tuple[int, int]]:
    """(start, stop) of each run of adjacent True."""
    edge = torch.diff(row.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    return list(zip((edge == 1).nonzero()[:, 0].tolist(), (edge == -1).nonzero()[:, 0].tolist(), strict=True))
