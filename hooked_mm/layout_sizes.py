"""Layouts of images that keep their own size: the tensors say how large each is, and the tower cuts it as it is.

| tensors | configuration | kind | models |
|---|---|---|---|
| `image_sizes` (pixels), no pinpoints | `spatial_merge_size` | packed | Pixtral: Mistral 3, LightOnOCR |
| `spatial_shapes` (patches) | `downsample_factor` | crops | SigLIP 2: LFM2-VL |
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hooked_mm.layout import ImageLayout, Plan, cells
from hooked_mm.layout_source import Read, Source, in_row_zero, nothing


def packed_by_size(source: Source) -> Read:
    """The patches of all images one behind the other, each row by row; m x m neighbours make one token."""
    patch, merge = source.config.vision_config.patch_size, getattr(source.config, "spatial_merge_size", 1)
    plans: list[Plan] = []
    owner: list[int] = []
    tokens = 0
    for number, (height, width) in enumerate(source.inputs["image_sizes"].tolist()):
        rows, cols = height // patch, width // patch
        place = torch.arange(rows * cols).view(rows, cols) + len(owner)
        token = torch.arange((rows // merge) * (cols // merge)).view(rows // merge, cols // merge)
        layout = ImageLayout(grid=token, patches=in_row_zero(place), tokens=in_row_zero(token + tokens))
        plans.append(Plan(layout, token.numel(), nothing()))
        owner += [number] * (rows * cols)
        tokens += token.numel()
    return Read("packed", plans, torch.tensor(owner))


def rows_by_shape(source: Source) -> Read:
    """A row of the tower is an image, or a tile of one if the processor says so, filled up to the longest."""
    shapes = [tuple(shape) for shape in source.inputs["spatial_shapes"].tolist()]
    width = source.inputs["pixel_values"].shape[1]
    merge = getattr(source.config, "downsample_factor", 1)
    counts = [(rows // merge) * (cols // merge) for rows, cols in shapes]
    plans: list[Plan] = []
    owner: list[int] = []
    for number, group in enumerate(_together(counts, source.counts)):
        rows, cols = shapes[group[0]]
        alone = ImageLayout()
        if len(group) == 1:
            token = torch.arange(counts[group[0]]).view(rows // merge, cols // merge)
            alone = ImageLayout(grid=token, patches=cells(group[0], rows, cols))
        plans.append(Plan(alone, sum(counts[row] for row in group), nothing()))
        owner += [number] * len(group)
    valid = torch.arange(width) < torch.tensor([rows * cols for rows, cols in shapes])[:, None]
    why = "how this image's tiles are arranged is not in the tensors"
    return Read("crops", plans, torch.tensor(owner), {"valid": valid, "patches": width, "why": why})


def _together(counts: list[int], totals: object) -> Iterator[list[int]]:
    """Which rows make each image: as many as give its total; without totals each is one."""
    if not isinstance(totals, list | tuple):
        yield from ([row] for row in range(len(counts)))
        return
    row = 0
    for total in totals:
        group: list[int] = []
        while row < len(counts) and sum(counts[one] for one in group) < total:
            group.append(row)
            row += 1
        yield group
