"""Reading the layout of documents' readers: a page whole and, if it is large, in crops before it; a mark at the end.

DeepSeek-OCR 2 lets learned queries read each view, which belong to no place; Unlimited-OCR has one position per patch
and a newline behind every row of its views. The positions of an image, one run, are

    queries      crops * l² + g² + 1
    newlines     rows l (cols l + 1) + g (g + 1) + 1

with g (l) tokens in a row of the whole page (of a crop); crops lie in rows x cols.

Step marks each crop and the whole picture behind them: an image is as many runs as it has crops, and one more.
"""

from __future__ import annotations

import math

import torch

from hooked_mm.errors import BadInputError
from hooked_mm.layout import ImageLayout, Plan, cells
from hooked_mm.layout_source import Read, Source, nothing, runs_of


def has_views(source: Source) -> bool:
    """Whether a tower stands on another's features, and there is one run of image positions per page."""
    if not hasattr(getattr(source.config, "vision_config", None), "sam_config") or "pixel_values" not in source.inputs:
        return False
    return sum(len(runs_of(row)) for row in source.image) == len(source.inputs["pixel_values"])


def read_views(source: Source) -> Read:
    """Where the views of each page lie; crops run through the tower on their own, so only the whole page has rows.

    Raises:
        BadInputError: If there are crops, and no tensor that says how many each page has.
    """
    pages = source.inputs["pixel_values"]
    if "pixel_values_local" in source.inputs and "num_local_patches" not in source.inputs:
        raise BadInputError(
            "the batch has crops of pages (pixel_values_local), but no tensor num_local_patches: a list of them can't "
            "be cut and moved with the batch. Make the tensor, or the batch without crops (crop_to_patches=False)"
        )
    crops = source.inputs.get("num_local_patches", torch.zeros(len(pages), dtype=torch.long)).tolist()
    grids = source.inputs.get("patches_grid", torch.zeros(len(pages), 2, dtype=torch.long)).tolist()
    small = source.inputs.get("pixel_values_local", pages).shape[-1] / pages.shape[-1]
    plans: list[Plan] = []
    sides, lines = [0], False
    for sample, row in enumerate(source.image):
        for start, stop in runs_of(row):
            number, count = len(plans), stop - start
            layout = None
            if not crops[number] or any(grids[number]):
                layout = _with_newlines(number, count, grids[number], small)
            if layout is not None and layout.patches is not None:
                sides.append(len(layout.patches))
            lines = lines or layout is not None
            separators = _separators(layout, count)
            plans.append(Plan(layout or ImageLayout(), count, separators, sample))
    owner = torch.arange(len(pages))
    if lines:
        return Read("crops", plans, owner, {"patches": sides[-1] ** 2, "tokens": sides[-1] ** 2})
    why = "this model's image positions are latent queries, which belong to no place in the image"
    return Read("resampled", plans, owner, {"why": why})


def has_marked_crops(source: Source) -> bool:
    """Whether every crop and every whole picture is a run of image positions of its own."""
    crops = source.inputs.get("num_local_patches")
    if crops is None or "pixel_values_local" not in source.inputs:
        return False
    return sum(len(runs_of(row)) for row in source.image) == int(crops.sum()) + len(crops)


def read_marked_crops(source: Source) -> Read:
    """The crops of each picture, then the whole; how the crops are arranged is not in the tensors."""
    crops = source.inputs["num_local_patches"].tolist()
    plans: list[Plan] = []
    for sample, row in enumerate(source.image):
        runs = [stop - start for start, stop in runs_of(row)]
        while runs:
            number = len(plans)
            own, runs = runs[: crops[number] + 1], runs[crops[number] + 1 :]
            side = math.isqrt(own[-1])
            whole = sum(own[:-1]) + torch.arange(side * side).view(side, side) if side * side == own[-1] else None
            layout = ImageLayout(overview=whole) if crops[number] else ImageLayout(grid=whole)
            plans.append(Plan(layout, sum(own), nothing(), sample))
    why = "the crops of a picture run through the tower on their own, and how they are arranged is not in the tensors"
    return Read("crops", plans, torch.zeros(0, dtype=torch.long), {"why": why})


def _with_newlines(number: int, count: int, grid: list[int], small: float) -> ImageLayout | None:
    """The page's grid, and that of its stitched crops; None if its positions are not lines that end in newlines."""
    cols, rows = grid
    for side in range(1, math.isqrt(count) + 1):
        part = round(side * small) if any(grid) else 0
        high, wide = rows * part, cols * part
        if high * (wide + 1) + side * (side + 1) + 1 != count:
            continue
        before = high * (wide + 1)
        page = before + torch.arange(side * (side + 1)).view(side, side + 1)[:, :-1]
        if not before:
            place = cells(number, side, side)
            return ImageLayout(grid=page, patches=place, tokens=place)
        return ImageLayout(grid=torch.arange(before).view(high, wide + 1)[:, :-1], overview=page)
    return None


def _separators(layout: ImageLayout | None, count: int) -> torch.Tensor:
    """The positions that hold no patch: newlines, and the mark at the end."""
    if layout is None or layout.grid is None:
        return torch.tensor([count - 1])
    patch = torch.zeros(count, dtype=torch.bool)
    patch[layout.grid.flatten()] = True
    if layout.overview is not None:
        patch[layout.overview.flatten()] = True
    return (~patch).nonzero()[:, 0]
