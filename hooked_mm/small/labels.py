"""What each part of a scene's picture shows: the truth that towers and image tokens learn to name."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hooked_mm.scenes.language import WORD_CLASSES
from hooked_mm.scenes.world import Scene

IGNORE = -100

ATTRIBUTES = ("shapes", "colours", "sizes", "positions")
"""What a part of the picture that an object covers is labelled with; a part of the background with its place."""

Labels = dict[str, Int[Tensor, "n parts"]]


def label_cells(item: Scene, cover: Float[Tensor, "objects cells"], inside: Float[Tensor, " cells"]) -> Labels:
    """What each cell shows, or IGNORE where it shows neither an object nor background.

    Args:
        item: The scene.
        cover: Which share of each cell each object covers.
        inside: Which share of each cell is picture, and not padding.
    """
    owner = torch.where(cover.amax(0) > 0.15, cover.argmax(0), -1)
    labels = {}
    for name in ATTRIBUTES:
        words = [getattr(o, name.removesuffix("s")) for o in item.objects]
        labels[name] = torch.tensor([*(WORD_CLASSES[name].index(word) for word in words), IGNORE])[owner]
    place = WORD_CLASSES["places"].index(item.place)
    labels["places"] = torch.where((cover.sum(0) < 0.02) & (inside > 0.9), place, IGNORE)
    labels["object"] = (owner >= 0).long()
    return labels


def part_labels(item: Scene, masks: Float[np.ndarray, "objects h w"], rows: int, cols: int, padded: bool) -> Labels:
    """What each cell of a grid over the picture (over its padded square) shows, or IGNORE where it shows neither."""
    cover = torch.from_numpy(masks).float()
    inside = torch.ones_like(cover[:1])
    if padded:
        height, width = cover.shape[1:]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        space = (left, side - width - left, top, side - height - top)
        cover, inside = F.pad(cover, space), F.pad(inside, space)
    cover = F.adaptive_avg_pool2d(cover, (rows, cols)).flatten(1)
    inside = F.adaptive_avg_pool2d(inside, (rows, cols)).flatten()
    return label_cells(item, cover, inside)
