"""Layout of images that text reads by cross-attention: they have no positions in the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooked_mm.encoders import vision_config
from hooked_mm.layout import ImageLayout, Plan, cells
from hooked_mm.layout_source import Read, Source, nothing, pictures

WHY = "text reads this model's images by cross-attention; the sequence holds no image features"


def read_attended(source: Source) -> Read:
    """A row of pictures is an image; samples have equally many, or slots of their own (b, images, 3, h, w)."""
    values = next(iter(pictures(source.inputs).values()))
    rows, each = (values.flatten(0, 1), values.shape[1]) if values.ndim == 5 else (values, 1)
    shown = rows.flatten(1).any(dim=1).cpu()
    owners = torch.arange(len(rows)) // each
    down, across = _patches(source, rows)
    plans = []
    for row in shown.nonzero()[:, 0].tolist():
        grid = cells(row, down, across) if down * across else None
        plans.append(Plan(ImageLayout(patches=grid), 0, nothing(), int(owners[row])))
    tower = torch.where(shown, shown.cumsum(0) - 1, -1)
    facts: dict[str, Any] = {"why": WHY}
    return Read("cross", plans, tower, {**facts, "patches": down * across} if down * across else facts)


def _patches(source: Source, pixels: Tensor) -> tuple[int, int]:
    """The grid that a tower of patches cuts its pictures into; (0, 0) if its configuration names no patch."""
    tower = vision_config(source.config)
    side = getattr(tower, "patch_size", None)
    # A tower of stages (Swin) merges patches on the way.
    if pixels.ndim != 4 or not isinstance(side, int) or hasattr(tower, "depths"):
        return 0, 0
    return pixels.shape[2] // side, pixels.shape[3] // side
