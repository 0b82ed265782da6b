"""Layout of images that text reads by cross-attention: they have no positions in the sequence."""

from __future__ import annotations

import torch

from hooked_mm.layout import ImageLayout, Plan
from hooked_mm.layout_source import Read, Source, nothing, pictures

WHY = "text reads this model's images by cross-attention; the sequence holds no image features"


def read_attended(source: Source) -> Read:
    """A row of pictures is an image; samples have equally many, or slots of their own (b, images, 3, h, w)."""
    values = next(iter(pictures(source.inputs).values()))
    rows, each = (values.flatten(0, 1), values.shape[1]) if values.ndim == 5 else (values, 1)
    shown = rows.flatten(1).any(dim=1).cpu()
    owners = torch.arange(len(rows)) // each
    plans = [Plan(ImageLayout(), 0, nothing(), int(owners[row])) for row in shown.nonzero()[:, 0].tolist()]
    tower = torch.where(shown, shown.cumsum(0) - 1, -1)
    return Read("cross", plans, tower, {"why": WHY})
