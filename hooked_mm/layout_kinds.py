"""Reading a layout from the model's forward tensors and configuration, by what these hold.

| tensors | configuration | kind | models |
|---|---|---|---|
| `image_grid_thw` | how patches are merged (`layout_packed`) | packed | Qwen-VL and its kin |
| `target_sizes`, pictures in one row of pixels | | packed | MiniCPM-V 4.6 and 4.7, MiniCPM-OCR |
| `aspect_ratio_ids` | `vision_config.supported_aspect_ratios` | cross | Mllama |
| `image_sizes` | `image_grid_pinpoints` | newline | LLaVA-NeXT, LLaVA-OneVision |
| a run of positions per page | `vision_config.sam_config` (`layout_views`) | crops, resampled | DeepSeek-OCR 2 |
| `pixel_values` (b, crops, 3, h, w) | | crops | Idefics3, SmolVLM |
| `pixel_values` (crops, 3, h, w) | | crops | LLaVA, Gemma 3, InternVL, Florence-2 |
| one of the last two | `perceiver_config` or `qformer_config` | resampled | Idefics2, BLIP-2 |
| anything else | | runs | all that have no reader yet |

Add a kind: write its reader, add a row to `READERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from hooked_mm.errors import BadInputError
from hooked_mm.layout import ImageLayout, Layout, Plan, Tiles, cells, place_images, stitch
from hooked_mm.layout_attended import read_attended
from hooked_mm.layout_indexed import has_index, read_indexed
from hooked_mm.layout_packed import is_packed, read_packed
from hooked_mm.layout_sizes import packed_by_size, rows_by_shape
from hooked_mm.layout_source import Read, Source, nothing, pictures, runs_of
from hooked_mm.layout_views import has_marked_crops, has_views, read_marked_crops, read_views


def read_layout(source: Source) -> Layout:
    """Where the images of a batch lie.

    Raises:
        BadInputError: If the image positions of a sample are not those its images take.
    """
    nowhere = torch.full(source.image.shape, -1, dtype=torch.long)
    none = Layout("none", nowhere.new_zeros(0), nowhere, torch.zeros_like(source.image, device="cpu"))
    device = source.image.device
    if not pictures(source.inputs):
        return none.to(device)
    # Counting is done on the host; pixels and their masks stay where they are.
    small = {name: value if name.startswith("pixel") else value.cpu() for name, value in source.inputs.items()}
    host = replace(source, image=source.image.cpu(), inputs=small)
    found = next(read for fits, read in READERS if fits(host))(host)
    sample, index, separator, images = place_images(host.image, found.plans)
    tower = found.tower_image if len(found.tower_image) else None
    layout = Layout(found.kind, sample, index, separator, images, tower, **found.facts)
    return layout.to(device)


def has_image_positions(config: Any) -> bool:
    """Whether image features stand in the text's sequence; not where text reads them by cross-attention alone."""
    return not getattr(config.get_text_config(), "cross_attention_layers", None)


def _cross(source: Source) -> Read:
    """A row of the tower is an image slot of a sample: its tiles one behind the other, filled up with empty ones."""
    vision = source.config.vision_config
    ids = source.inputs["aspect_ratio_ids"]
    side = source.inputs["pixel_values"].shape[-1] // vision.patch_size
    tiles = source.inputs["pixel_values"].shape[2]
    valid = torch.zeros(ids.numel(), tiles * side**2, dtype=torch.bool)
    plans: list[Plan] = []
    owner = torch.full((ids.numel(),), -1)
    for row, ratio in enumerate(ids.flatten().tolist()):
        if not ratio:
            continue
        rows, cols = vision.supported_aspect_ratios[ratio - 1]
        grids = [cells(row, side, side, start=tile * side**2) for tile in range(rows * cols)]
        patches = stitch(grids, rows, cols)
        valid[row, : rows * cols * side**2] = True
        owner[row] = len(plans)
        layout = ImageLayout(patches=patches, tokens=patches)
        plans.append(Plan(layout, 0, nothing(), sample=row // ids.shape[1]))
    facts = {
        "valid": valid,
        "tiles": tiles,
        "patches": side**2,
        "tokens": side**2,
        "why": "text reads this model's images by cross-attention; the sequence holds no image features",
    }
    return Read("cross", plans, owner, facts)


def _newline(source: Source) -> Read:
    """Overview, then the stitched crops without the border that was added to fill them, a newline behind each row.

    As LLaVA-NeXT's and LLaVA-OneVision's `pack_image_features`; OneVision shrinks very large grids. An image beside
    others in its sample (OneVision) is shown once and small.
    """
    vision, config = source.config.vision_config, source.config
    size, wide = vision.image_size, vision.image_size // vision.patch_size
    # Granite's projectors make fewer tokens of a window of patches.
    side = int(wide * Fraction(getattr(config, "downsample_rate", None) or 1))
    numbers = source.inputs.get("batch_num_images")
    sizes = source.inputs["image_sizes"].tolist()
    cut = [True] * len(sizes) if numbers is None else [n == 1 for n in numbers.tolist() for _ in range(n)]
    plans, owner, row = [], [], 0
    for number, (height, width) in enumerate(sizes):
        base = torch.arange(side**2).view(side, side)
        small, fine = cells(row, side, side), cells(row, wide, wide)
        if not cut[number]:
            layout = ImageLayout(grid=base, patches=fine, tokens=small)
            plans.append(Plan(layout, side**2 + 1, torch.tensor([side**2])))
            owner.append(number)
            row += 1
            continue
        best = select_best_resolution([height, width], config.image_grid_pinpoints)
        rows, cols = best[0] // size, best[1] // size
        large, fines = (
            stitch([cells(row + 1 + crop, each, each) for crop in range(rows * cols)], rows, cols)
            for each in (side, wide)
        )
        grid, separators = _rows_with_newlines(
            (rows * side, cols * side), (height, width), _limit(config, side), side**2
        )
        layout = ImageLayout(grid, base, fines, fine, large, small)
        plans.append(Plan(layout, int(separators[-1]) + 1, separators))
        owner += [number] * (rows * cols + 1)
        row += rows * cols + 1
    return Read("newline", plans, torch.tensor(owner), {"patches": wide**2, "tokens": side**2})


def _limit(config: Any, side: int) -> int:
    """How many tokens a stitched grid may have before it is shrunk; 0 for no limit."""
    ratio = getattr(config, "vision_aspect_ratio", None)
    return int(ratio.removeprefix("anyres_max_")) * side**2 if ratio else 0


def _rows_with_newlines(
    full: tuple[int, int], picture: tuple[int, int], limit: int, start: int
) -> tuple[Int[Tensor, "rows cols"], Int[Tensor, " rows"]]:
    """The stitched grid's ordinals (from `start`, -1 in the border) and those of the newlines."""
    (rows, cols), (height, width) = full, picture
    top = left = 0
    if width / height > cols / rows:
        top = (rows - int(round(height * (cols / width), 7))) // 2
    else:
        left = (cols - int(round(width * (rows / height), 7))) // 2
    inner = (rows - 2 * top, cols - 2 * left)
    ratio = math.sqrt(inner[0] * inner[1] / limit) if limit else 0.0
    if ratio > 1.1:
        inner = (int(inner[0] // ratio), int(inner[1] // ratio))
        full, top, left = inner, 0, 0
    grid = torch.full(full, -1)
    line = start + torch.arange(inner[0])[:, None] * (inner[1] + 1)
    grid[top : top + inner[0], left : left + inner[1]] = line + torch.arange(inner[1])
    return grid, (line + inner[1]).flatten()


def _crops(source: Source) -> Read:
    """Crop by crop, each with as many positions as any other."""
    pixels, config = _pixels(source), source.config
    assert pixels is not None
    sample = torch.full((len(pixels),), -1)
    if pixels.ndim == 5:
        sample = _real_crops(pixels).nonzero()[:, 0]
    rows, total = len(sample), int(source.image.sum())
    if not rows or total % rows:
        raise BadInputError(
            f"{total} image positions can't be shared equally by {rows} crops of images; each image token of the text "
            "must be expanded to the number of patches, and there must be one per image"
        )
    per = total // rows
    resampled = _resampled(config)
    shapes, stride = _patch_shapes(source, pixels)
    merge, lead = (0, 0) if resampled else _merge(shapes[0], per)
    fine = [cells(row, *shapes[row], width=stride[1]) for row in range(rows)]
    coarse = [cells(row, shape[0] // merge, shape[1] // merge) for row, shape in enumerate(shapes)] if merge else []
    tiles = _tiles(source, sample.tolist(), per)
    plans, owner, row = [], [], 0
    for number, tile in enumerate(tiles):
        count = _crop_count(tile)
        layout = _image_of_crops(tile, row, fine, coarse, per, lead)
        plans.append(Plan(layout, count * per, nothing(), int(sample[row])))
        owner += [number] * count
        row += count
    valid = torch.zeros(rows, stride[0] * stride[1], dtype=torch.bool)
    for grid in fine:
        valid[grid[..., 0], grid[..., 1]] = True
    facts: dict[str, Any] = {"valid": valid, "patches": stride[0] * stride[1]}
    if hasattr(config.vision_config, "patch_stride"):
        facts = {"why": "the tower is a row of stages, each with a grid of its own"}
        plans = [replace(plan, layout=replace(plan.layout, patches=None)) for plan in plans]
    if resampled:
        facts["why"] = "this model's image positions are latent queries, which belong to no place in the image"
        facts["tokens"] = per
        return Read("resampled", plans, torch.tensor(owner), facts)
    facts["tokens"] = per - lead if merge else 0
    unknown = "how this image's crops are arranged is not in the tensors; make the batch with model.prepare(...)"
    facts.setdefault("why", unknown if merge else f"{per} positions do not fit a crop of {shapes[0]} patches")
    return Read("crops", plans, torch.tensor(owner), facts)


def _real_crops(pixels: Float[Tensor, "b crops 3 h w"]) -> Bool[Tensor, "b crops"]:
    """Samples with fewer crops are filled up with zeros, which the model takes out before the tower."""
    return (pixels != 0).flatten(2).any(dim=2).cpu()


def _crop_count(tile: Tiles) -> int:
    return max(1, tile.rows) * tile.cols + bool(tile.overview)


def _image_of_crops(
    tile: Tiles, row: int, fine: list[Tensor], coarse: list[Tensor], per: int, lead: int
) -> ImageLayout:
    """Stitch the crops that begin at tower row `row`; positions count from the image's first."""
    parts = list(range(row, row + _crop_count(tile)))
    whole = parts.pop(0 if tile.overview == "first" else -1) if tile.overview else None

    def grids(of: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        if not of:
            return None, None
        main = stitch([of[part] for part in parts], tile.rows, tile.cols) if tile.rows else None
        return main, None if whole is None else of[whole]

    def ordinals(tokens: Tensor | None) -> Tensor | None:
        return None if tokens is None else (tokens[..., 0] - row) * per + tokens[..., 1] + lead

    patches, tokens = grids(fine), grids(coarse)
    return ImageLayout(ordinals(tokens[0]), ordinals(tokens[1]), *patches, *tokens)


def _patch_shapes(source: Source, pixels: Tensor) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """The real patches (rows, cols) of each crop, and the (rows, cols) that all crops are filled up to."""
    vision = source.config.vision_config
    size: Any = vision.patch_size
    height, width = pixels.shape[-2:]
    if isinstance(size, list | tuple):
        if not hasattr(vision, "patch_stride"):
            size = size[0]
        else:
            # A tower of stages, each with a convolution of its own; crops are whole.
            for kernel, step, pad in zip(size, vision.patch_stride, vision.patch_padding, strict=True):
                height, width = ((side + 2 * pad - kernel) // step + 1 for side in (height, width))
            size = 1
    stride = (height // size, width // size)
    if pixels.ndim == 4:
        return [stride] * len(pixels), stride
    real = _real_crops(pixels)
    mask = source.inputs.get("pixel_attention_mask")
    if mask is None or mask.ndim == 2:
        return [stride] * int(real.sum()), stride
    heights, widths = (mask.bool().any(dim=axis).sum(dim=2).cpu()[real] // size for axis in (3, 2))
    return list(zip(heights.tolist(), widths.tolist(), strict=True)), stride


def _merge(shape: tuple[int, int], per: int) -> tuple[int, int]:
    """(m, lead): m x m patches make one token, and `lead` tokens of the crop stand before them; m = 0: does not fit."""
    for lead in (0, 1):
        ratio = shape[0] * shape[1] / (per - lead) if per > lead else 0.0
        merge = math.isqrt(int(ratio))
        if merge and merge**2 == ratio and shape[0] % merge == 0 and shape[1] % merge == 0:
            return merge, lead
    return 0, 0


def _resampled(config: Any) -> bool:
    names = ("perceiver_config", "qformer_config", "latent_query_num", "projector_patch_to_query_dict")
    return any(hasattr(config, name) for name in names)


def _tiles(source: Source, samples: list[int], per: int) -> list[Tiles]:
    """How the crops make images: as the processor says, as the ids tell, or one crop an image."""
    if source.counts is not None and source.arrange is not None:
        return [source.arrange(number, count // per) for number, count in enumerate(source.counts)]
    if samples and samples[0] >= 0 and not _resampled(source.config):
        return _tiles_by_marks(source, per)
    if hasattr(source.config, "downsample_ratio"):
        runs = [stop - start for row in source.image for start, stop in runs_of(row)]
        return [Tiles() if run == per else Tiles(0, run // per - 1, "last") for run in runs]
    return [Tiles()] * len(samples)


def _tiles_by_marks(source: Source, per: int) -> list[Tiles]:
    """Idefics3 marks crops: fake, <row_r_col_c>, crop, ..., a line break behind each row; fake, <global>, crop, fake.

    So the mark before a sample's last crop is the global one, and what follows that crop is the fake token. Granite
    Docling does the same, but writes a picture of one crop as a single row, without a global one.
    """
    tiles: list[Tiles] = []
    ids = source.inputs["input_ids"]
    for number, row in enumerate(source.image):
        runs = [(at, at + per) for start, stop in runs_of(row) for at in range(start, stop, per)]
        if not runs:
            continue
        last_start, last_stop = runs[-1]
        if not last_start or last_stop >= len(row):
            raise BadInputError("an image's crops have no marks around them; use the model's own processor", number)
        marks = [int(ids[number, start - 1]) for start, _ in runs]
        whole, fake = marks[-1], int(ids[number, last_stop])
        if runs[0][0] > 1 and fake != (before := int(ids[number, last_start - 2])):
            # The last picture is a single row.
            fake = before
            whole = next((one for one, two in pairwise(marks) if two == marks[-1] != one), marks[-1])
        breaks, crops, end = 0, 0, 0
        for (_, stop), mark in zip(runs, marks, strict=True):
            if crops and mark == marks[0] != whole:
                tiles.append(Tiles())
                breaks = crops = 0
            if mark == whole:
                lines = breaks + 1
                tiles.append(Tiles(lines, crops // lines, "last") if crops else Tiles())
                breaks = crops = 0
            else:
                breaks += crops > 0 and int(ids[number, end]) != fake
                crops += 1
            end = stop
        tiles += [Tiles()] * bool(crops)
    return tiles


def _has_vision(source: Source, name: str) -> bool:
    return hasattr(getattr(source.config, "vision_config", None), name)


def _pixels(source: Source) -> Tensor | None:
    """The pictures: by their usual name, or the only tensor that holds some (Video-LLaVA's has a name of its own)."""
    found = pictures(source.inputs)
    return found.get("pixel_values", next(iter(found.values())) if len(found) == 1 else None)


def _is_of_crops(source: Source) -> bool:
    """Crops of one size, each a picture of its own, and a tower of square patches."""
    pixels = _pixels(source)
    return (
        pixels is not None
        and pixels.ndim in (4, 5)
        and pixels.shape[-3] in (1, 3)
        and _has_vision(source, "patch_size")
    )


def _runs(source: Source) -> Read:
    """An image is a run of adjacent image positions; runs with one and the same token between them are its rows."""
    plans = []
    for sample, row in enumerate(source.image):
        counts = _rows_joined(source.inputs["input_ids"][sample].tolist(), runs_of(row))
        plans += [Plan(ImageLayout(), count, nothing(), sample) for count in counts]
    why = "how this model's image positions lie in the picture is not known; add a reader to hooked_mm/layout_kinds.py"
    return Read("runs", plans, torch.zeros(0, dtype=torch.long), {"why": why})


def _rows_joined(ids: list[int], runs: list[tuple[int, int]]) -> list[int]:
    """How many positions each image has: equally long runs with a single, always equal token between them are one."""
    gaps = {tuple(ids[one[1] : two[0]]) for one, two in pairwise(runs)}
    lengths = {stop - start for start, stop in runs}
    if len(runs) > 1 and len(gaps) == 1 and len(next(iter(gaps))) == 1 and len(lengths) == 1:
        return [sum(stop - start for start, stop in runs)]
    return [stop - start for start, stop in runs]


READERS: tuple[tuple[Callable[[Source], bool], Callable[[Source], Read]], ...] = (
    (has_index, read_indexed),
    (is_packed, read_packed),
    (lambda source: "aspect_ratio_ids" in source.inputs and _has_vision(source, "supported_aspect_ratios"), _cross),
    (lambda source: source.attended, read_attended),
    (lambda source: "image_sizes" in source.inputs and hasattr(source.config, "image_grid_pinpoints"), _newline),
    (lambda source: "image_sizes" in source.inputs and _has_vision(source, "patch_size"), packed_by_size),
    (lambda source: "spatial_shapes" in source.inputs, rows_by_shape),
    (has_views, read_views),
    (has_marked_crops, read_marked_crops),
    (lambda source: _is_of_crops(source), _crops),
    (lambda source: True, _runs),
)
"""Condition and reader, the first that fits."""
