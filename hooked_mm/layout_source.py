"""What a layout is read from, and what a reader gives."""

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
    """

    inputs: Mapping[str, Tensor]
    image: Bool[Tensor, "b p"]
    config: Any
    counts: Sequence[int] | None = None
    arrange: Arrange | None = None


@dataclass(frozen=True)
class Read:
    """What a reader found; the rest of `Layout` follows from it."""

    kind: Kind
    plans: list[Plan]
    tower_image: Tensor
    facts: dict[str, Any] = field(default_factory=dict)


def nothing() -> Int[Tensor, " none"]:
    """No positions."""
    return torch.zeros(0, dtype=torch.long)
