"""Where each image lies: its positions in the sequence, its patches in the tower, its tokens behind the projector.

Words. An image is shown to the tower as one or more *crops*: parts of it that together make the whole at the finest
resolution, and often an *overview*, the whole image made small. Each crop is a grid of *patches* in the tower and a
grid of *tokens* behind the projector, which may merge neighbouring patches. A tower runs on rows (one crop each; in
Mllama one image each, its crops one behind the other) or on one packed row of all patches (Qwen-VL).

What is needed is read from the model's own forward tensors and configuration (`layout_kinds`); nothing is looked up by
the name of a family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mm.errors import BadInputError

Kind = Literal["none", "crops", "newline", "packed", "resampled", "cross", "runs"]
"""How the positions of an image follow each other:

- `none`: the batch has no images.
- `crops`: crop by crop, each row by row.
- `newline`: the overview row by row, then the stitched crops row by row with a separator behind each row.
- `packed`: row by row, for a packed tower.
- `resampled`: latent queries that belong to no place in the image: there is no grid of positions.
- `runs`: in an order that is not known: where image positions are, is known, and nothing of their places in the image.
- `cross`: none; text attends to the tower's patches by cross-attention. The image token is text.
"""


Where = Literal["sequence", "patches", "tokens"]
"""What a grid's cells are: positions of the text's sequence, patches of the tower, tokens behind the projector."""


@dataclass(frozen=True)
class Tiles:
    """How the crops of one image are arranged: in (rows, cols), and where the overview comes among them.

    `rows` = 0: not known.
    """

    rows: int = 1
    cols: int = 1
    overview: Literal["", "first", "last"] = ""


@dataclass(frozen=True)
class ImageLayout:
    """One image. `None` where there is no such grid.

    Attributes:
        grid: (rows, cols) int64, positions in the sequence, stitched over all crops but the overview; -1 where the
            model has none (a border that it cut off).
        overview: (rows, cols) int64, positions of the overview, if the image has crops beside it.
        patches: (rows, cols, 2) int64, the tower's row and the patch in it (leading class token not counted), stitched.
            In a packed tower the row is 0 and the patch counts as the tower's *blocks* see them. In Mllama the patches
            of a row's crops follow each other.
        patches_overview: The same of the overview.
        tokens: (rows, cols, 2) int64, as `patches` behind the projector.
        tokens_overview: The same of the overview.
    """

    grid: Tensor | None = None
    overview: Tensor | None = None
    patches: Tensor | None = None
    patches_overview: Tensor | None = None
    tokens: Tensor | None = None
    tokens_overview: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> ImageLayout:
        """The same with every grid changed."""
        return ImageLayout(**{name: None if v is None else change(v) for name, v in vars(self).items()})


@dataclass(frozen=True)
class Layout:
    """Where all images of a batch lie; images are numbered in batch order.

    Attributes:
        kind: See `Kind`.
        image_sample: (images,) int64, which sample each image belongs to.
        image_index: (b, p) int64, which image each position belongs to; -1 for text and padding.
        separator: (b, p) bool, image positions that hold no patch (newlines).
        images: One `ImageLayout` per image.
        tower_image: (rows,) int64, which image each row of the tower shows, -1 for a row of padding; for a packed
            tower (patches,).
        tower_order: (patches,) int64 for a packed tower: which patch of `pixel_values` stands at each place inside the
            blocks (Qwen2.5-VL sorts them by window); None for other towers.
        valid: (rows, patches) bool, which patches of the tower's rows belong to an image (leading class tokens not
            counted); None for a packed tower, where all do.
        tiles: How many crops lie in one row of the tower.
        patches: How many patches a crop has in the tower, 0 if not known.
        tokens: How many tokens (latents, if resampled) a crop has behind the projector, 0 if not known.
        why: Why there is no grid, where there is none.
    """

    kind: Kind
    image_sample: Int[Tensor, " images"]
    image_index: Int[Tensor, "b p"]
    separator: Bool[Tensor, "b p"]
    images: tuple[ImageLayout, ...] = ()
    tower_image: Int[Tensor, " rows"] | None = None
    tower_order: Int[Tensor, " patches"] | None = None
    valid: Bool[Tensor, "rows patches"] | None = None
    tiles: int = 1
    patches: int = 0
    tokens: int = 0
    why: str = ""

    def to(self, device: str | torch.device) -> Layout:
        """The same layout with its tensors on another device."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, images=tuple(image.map(lambda v: v.to(device)) for image in self.images))

    def pad(self, new: int) -> Layout:
        """The same layout with `new` positions of text behind every sample."""
        rows = self.image_index.shape[0]
        index = torch.cat([self.image_index, self.image_index.new_full((rows, new), -1)], dim=1)
        return replace(
            self,
            image_index=index,
            separator=torch.cat([self.separator, self.separator.new_zeros(rows, new)], dim=1),
        )

    def sheet(self, value: Tensor) -> Tensor:
        """A tower's or projector's value as (rows, places, ...): packed as one row, tiles one behind the other."""
        if self.kind == "packed" and self.tower_image is not None:
            return value if value.shape[0] == 1 < len(self.tower_image) else value[None]
        if self.kind == "cross" and value.ndim >= 5 and value.shape[2] == self.tiles:
            return value.flatten(0, 1).flatten(1, 2)
        return value

    def places(self, width: int, size: int) -> Int[Tensor, " width"] | None:
        """Which cell lies at each place of a row of `width`, crops having `size` cells; -1: class token, -2: padding.

        None if such crops do not make such a row.
        """
        if not size or width % self.tiles:
            return None
        stride = width // self.tiles
        extra = stride - size
        # One class token may lead; only Mllama, the tower with tiles, fills each tile up to a multiple of eight.
        if extra < 0 or (extra > 1 and (self.tiles == 1 or extra > 8)):
            return None
        lead = min(extra, 1)
        place = torch.arange(stride) - lead
        place[stride - (extra - lead) :] = -2
        tile = torch.arange(self.tiles)[:, None] * size
        return torch.where(place >= 0, place + tile, place).flatten()

    def owners(self, rows: int, width: int) -> Int[Tensor, "rows width"]:
        """Which image each (row, place) of a tower's or projector's value belongs to; -1 for padding of any kind.

        Raises:
            BadInputError: If the value is not one of this batch.
        """
        owner = self.tower_image
        if owner is None:
            why = self.why or "the batch has no images"
            raise BadInputError(f"which image each of {rows} x {width} patches belongs to is not known: {why}")
        if rows != len(owner) if self.kind != "packed" else len(owner) % width:
            raise BadInputError(
                f"a value of {rows} x {width} patches does not fit the {len(owner)} rows of this batch's tower"
            )
        if self.kind == "packed":
            return owner[:: len(owner) // width][None]
        spread = owner[:, None].expand(rows, width).clone()
        places = self.places(width, self.patches)
        if self.valid is None or places is None:
            return spread
        places = places.to(spread.device)
        real = self.valid[:, places.clamp_min(0)]
        crops = self.valid.unflatten(1, (self.tiles, -1)).any(dim=2).repeat_interleave(width // self.tiles, dim=1)
        return spread.masked_fill(~torch.where(places >= 0, real, crops & (places == -1)), -1)

    def read(self, image: int, value: Tensor, where: Where, *, overview: bool) -> Float[Tensor, "rows cols ..."]:
        """The values of one image as a grid; NaN where there is none.

        Args:
            image: Its number in the batch.
            value: (b, p, ...) for `sequence`, else as the tower or projector has it.
            where: Whether `value` holds positions of the sequence, patches, or tokens behind the projector.
            overview: The overview instead of the stitched crops.

        Raises:
            BadInputError: If there is no such grid; it says why.
        """
        names = {"sequence": ("grid", "overview"), "patches": ("patches", "patches_overview")}
        name = names.get(where, ("tokens", "tokens_overview"))[overview]
        grid = getattr(self.images[image], name)
        if grid is None:
            raise BadInputError(
                f"image {image} has no {'overview' if overview else 'grid'} of {where}: {self._lack(overview)}"
            )
        if where == "sequence":
            row, column = torch.full_like(grid, int(self.image_sample[image])), grid
        else:
            value = self.sheet(value)
            row, column = grid[..., 0], self._columns(grid[..., 1], value.shape[1], where)
        row, column = row.to(value.device), column.to(value.device)
        found = value[row, column.clamp_min(0)]
        return found.masked_fill((column < 0).view(*column.shape, *[1] * (found.ndim - 2)), torch.nan)

    def _lack(self, overview: bool) -> str:
        if overview and self.kind in ("crops", "newline", "packed", "cross"):
            return "it was shown to the tower once"
        return self.why or "this kind of layout has none"

    def _columns(self, cell: Tensor, width: int, where: Where) -> Tensor:
        """The places of cells in rows of `width`."""
        if self.kind == "packed":
            patches = 0 if self.tower_image is None else len(self.tower_image)
            if where == "patches" and width != patches:
                raise BadInputError(
                    f"the {patches} patches that enter this tower are merged on the way, and {width} places are left: "
                    "there is no grid of them here"
                )
            return cell
        places = self.places(width, self.patches if where == "patches" else self.tokens)
        if places is None:
            raise BadInputError(
                f"rows of {width} places do not fit crops of {self.patches} patches, {self.tokens} tokens"
            )
        real = (places >= 0).nonzero()[:, 0]
        place = torch.empty(len(real), dtype=torch.long)
        place[places[real]] = real
        return place.to(cell.device)[cell]

    def fits_patches(self, value: Tensor) -> bool:
        """Whether a projector's value still has the tower's patches, not merged or resampled ones."""
        width = self.sheet(value).shape[1]
        if self.kind == "packed" and self.tower_image is not None:
            return width == len(self.tower_image)
        return self.places(width, self.patches) is not None and (self.kind != "resampled" or width != self.tokens)


@dataclass(frozen=True)
class Plan:
    """One image before its place in the sequence is known: `layout.grid` and `.overview` count from its first position.

    `count` positions belong to it, of which `separators` (n,) hold no patch; `sample` is -1 if the count must tell.
    """

    layout: ImageLayout
    count: int
    separators: Int[Tensor, " n"]
    sample: int = -1


def cells(row: int, rows: int, cols: int, width: int | None = None, start: int = 0) -> Int[Tensor, "rows cols 2"]:
    """(row, cell) of a crop whose cells follow each other row by row, `width` to a row."""
    cell = torch.arange(rows)[:, None] * (cols if width is None else width) + torch.arange(cols) + start
    return torch.stack([torch.full_like(cell, row), cell], dim=-1)


def stitch(crops: list[Tensor], rows: int, cols: int) -> Tensor:
    """Grids of crops, row by row, as one grid."""
    return torch.cat([torch.cat(crops[row * cols : (row + 1) * cols], dim=1) for row in range(rows)], dim=0)


def place_images(
    image: Bool[Tensor, "b p"], plans: list[Plan]
) -> tuple[Int[Tensor, " images"], Int[Tensor, "b p"], Bool[Tensor, "b p"], tuple[ImageLayout, ...]]:
    """Give the images their positions: image_sample, image_index, separator and the layouts.

    Raises:
        BadInputError: If a sample's image positions are not those of its images.
    """
    index = torch.full(image.shape, -1, dtype=torch.long)
    separator = torch.zeros(image.shape, dtype=torch.bool)
    owners: list[int] = []
    made: list[ImageLayout] = []
    queue = list(enumerate(plans))
    for sample in range(image.shape[0]):
        positions = image[sample].nonzero()[:, 0]
        mine = _of_sample(queue, sample, len(positions))
        needed = [plan.count for _, plan in mine]
        if sum(needed) != len(positions):
            raise BadInputError(
                f"has {len(positions)} image positions, but its {len(mine)} images take {sum(needed)} ({needed}); the "
                "text must hold one image token per image, expanded by the model's own processor and not cut off, and "
                "the images must come in the order of the samples",
                sample,
            )
        start = 0
        for number, plan in mine:
            own = positions[start : start + plan.count]
            index[sample, own] = number
            separator[sample, own[plan.separators]] = True
            grids = {name: _at(own, getattr(plan.layout, name)) for name in ("grid", "overview")}
            made.append(replace(plan.layout, **grids))
            owners.append(sample)
            start += plan.count
    if queue:
        raise BadInputError(
            f"the batch has {len(plans)} images, but image positions only for {len(owners)}; write one image token per "
            "image"
        )
    return torch.tensor(owners, dtype=torch.long), index, separator, tuple(made)


def _of_sample(queue: list[tuple[int, Plan]], sample: int, positions: int) -> list[tuple[int, Plan]]:
    """Take from the queue the images of a sample: those said to be its own, or as many as fill its positions."""
    mine: list[tuple[int, Plan]] = []
    while queue:
        plan = queue[0][1]
        full = sum(taken.count for _, taken in mine) >= positions
        if plan.sample > sample or (plan.sample < 0 and full):
            break
        mine.append(queue.pop(0))
    return mine


def _at(own: Tensor, ordinals: Tensor | None) -> Tensor | None:
    if ordinals is None or not len(own):
        return None
    return torch.where(ordinals >= 0, own[ordinals.clamp_min(0)], -1)
