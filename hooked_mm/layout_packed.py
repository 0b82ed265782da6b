"""Reading the layout of a packed tower: the patches of all images are one sequence, whose grids the tensors tell.

Patches of one image follow each other in blocks of merge x merge, block by block row by row (Qwen-VL and its kin), or
row by row over the whole image (patches that come as little pictures, towers that frame their tokens, and MiniCPM-V,
whose pictures are one row of pixels). Behind the projector a block is one token, row by row. HunYuan frames them: a
token before, one behind each row, and one at the end, which hold no patch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_mm.layout import ImageLayout, Plan
from hooked_mm.layout_source import Read, Source, in_row_zero, nothing
from hooked_mm.windows import window_order


def is_packed(source: Source) -> bool:
    """Whether the tensors tell the grid of every image, and the configuration how patches are merged."""
    if (sizes := _sizes(source)) is None or (merges := _merges(source)) is None:
        return False
    # Grids that count tokens (Inkling 2) belong to towers with a class token per image, for which there is no reader.
    return not (min(merges) > 1 and int(source.image.sum()) == int(sizes.prod(dim=1).sum()))


def _sizes(source: Source) -> Int[Tensor, "images 3"] | None:
    """Frames, rows and columns of patches of every image."""
    if (sizes := source.inputs.get("image_grid_thw")) is not None:
        return sizes
    sizes = source.inputs.get("target_sizes")
    return torch.nn.functional.pad(sizes, (1, 0), value=1) if sizes is not None and _in_a_row(source) else None


def _in_a_row(source: Source) -> bool:
    """Whether the pictures are one row of pixels, (1, 3, side, side * patches)."""
    pixels, sizes = source.inputs.get("pixel_values"), source.inputs.get("target_sizes")
    if pixels is None or sizes is None or pixels.ndim != 4 or len(pixels) != 1:
        return False
    return pixels.shape[-1] == pixels.shape[-2] * int(sizes.prod(dim=1).sum())


def read_packed(source: Source) -> Read:
    """Where the patches and tokens of each image lie.

    Qwen2.5-VL's blocks see the blocks of patches sorted by window (`window_order`), whole images apart; its
    tower's last step puts the tokens back.
    """
    sizes, merges = _sizes(source), _merges(source)
    assert sizes is not None
    assert merges is not None
    framed = _are_framed(source, sizes, merges)
    by_rows = framed or source.inputs["pixel_values"].ndim == 4
    order = _order(source.config.vision_config, sizes, merges)
    place = order.argsort()
    plans: list[Plan] = []
    owner: list[int] = []
    patches = tokens = 0
    for number, ((frames, height, width), merge) in enumerate(zip(sizes.tolist(), merges, strict=True)):
        total = frames * height * width
        cell = torch.arange(total)
        if by_rows:
            patch = cell.view(frames * height, width)
        else:
            blocks = cell.view(frames, height // merge, width // merge, merge, merge)
            patch = blocks.permute(0, 1, 3, 2, 4).reshape(frames * height, width)
        token, separators = _tokens(frames * height // merge, width // merge, framed)
        layout = ImageLayout(
            grid=token, patches=in_row_zero(place[patch + patches]), tokens=in_row_zero(token + tokens)
        )
        count = token.numel() + len(separators)
        plans.append(Plan(layout, count, separators))
        owner += [number] * total
        patches += total
        tokens += count
    return Read("packed", plans, torch.tensor(owner), {"tower_order": order})


def _merges(source: Source) -> list[int] | None:
    """How many patches of a row make one token, image by image; None if nothing says so."""
    vision: Any = getattr(source.config, "vision_config", None)
    if _in_a_row(source):
        # How far patches are merged is chosen per call; the number of positions tells.
        sizes, positions = source.inputs["target_sizes"], int(source.image.sum())
        merge = math.isqrt(int(sizes.prod(dim=1).sum()) // positions) if positions else 0
        fits = merge > 0 and int((sizes // merge).prod(dim=1).sum()) == positions
        return [merge] * len(sizes) if fits else None
    images = len(source.inputs["image_grid_thw"])
    if (each := source.inputs.get("image_merge_sizes")) is not None:
        return [int(merge) for merge in each]
    kernel = getattr(vision, "merge_kernel_size", None)
    each_side: Any = getattr(vision, "spatial_merge_size", kernel[0] if kernel else None)
    return None if each_side is None else [int(each_side)] * images


def _are_framed(source: Source, sizes: Int[Tensor, "images 3"], merges: list[int]) -> bool:
    """Whether there are as many image positions as tokens with their frames."""
    grids = [(t * h // m, w // m) for (t, h, w), m in zip(sizes.tolist(), merges, strict=True)]
    return int(source.image.sum()) == sum(rows * (cols + 1) + 2 for rows, cols in grids)


def _tokens(rows: int, cols: int, framed: bool) -> tuple[Int[Tensor, "rows cols"], Int[Tensor, " separators"]]:
    """The tokens of one image, counted from its first, and those that hold no patch."""
    if not framed:
        return torch.arange(rows * cols).view(rows, cols), nothing()
    lines = 1 + torch.arange(rows * (cols + 1)).view(rows, cols + 1)
    return lines[:, :-1], torch.cat([torch.tensor([0]), lines[:, -1], lines[-1:, -1] + 1])


def _order(vision: Any, sizes: Int[Tensor, "images 3"], merges: list[int]) -> Int[Tensor, " patches"]:
    """Which patch of `pixel_values` stands at each place inside the blocks."""
    if not hasattr(vision, "window_size"):
        return torch.arange(int(sizes.prod(dim=1).sum()))
    merge = merges[0]
    units = window_order(sizes, merge, vision.window_size // merge // vision.patch_size)
    return (units[:, None] * merge**2 + torch.arange(merge**2)).flatten()
