"""Values at a sample's positions, laid out over its pictures: what attributions and attention look like.

Where image positions form a grid, the value of a position is that of its patch. A resampler's latents belong to no
place; their values v are handed on to the tower's patches by v C (`hooked_mm.connector`). In models whose text
cross-attends, values belong to the keys of that attention. Values are taken as amounts: a map's sum is its share of the
whole, and a crop and the overview that show the same place add up there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from analyses.patch_maps import on_picture
from hooked_mm.batch import Batch
from hooked_mm.connector import Connector, connector_map, connector_patterns
from hooked_mm.errors import BadInputError
from hooked_mm.frames import Box, frame
from hooked_mm.hooked import HookedMM

Where = Literal["patches", "tokens", "sequence"]


@dataclass(frozen=True)
class PictureMap:
    """One grid over a picture.

    Attributes:
        picture: Which of the sample's pictures.
        overview: It is that of the overview beside the crops.
        values: Per patch; NaN where there is none.
        box: The part of the picture that the grid covers, in pixels.
    """

    picture: int
    overview: bool
    values: Float[Tensor, "rows cols"]
    box: Box

    def on_pixels(self, size: tuple[int, int], *, smooth: bool = True) -> Float[Tensor, "height width"]:
        """The value of every pixel of a picture of (width, height); see `patch_maps.on_picture`."""
        return on_picture(self.values, self.box, size, smooth=smooth)

    def density(self, size: tuple[int, int], *, smooth: bool = True) -> Float[Tensor, "height width"]:
        """The amount per pixel: a patch's value divided by its area, so that finer grids don't count for more."""
        left, top, right, bottom = self.box
        return self.on_pixels(size, smooth=smooth) * (self.values.numel() / ((right - left) * (bottom - top)))


def picture_maps(
    model: HookedMM,
    batch: Batch,
    sample: int,
    values: Float[Tensor, " p"],
    images: Sequence[Image.Image],
    connector: Connector | None = None,
) -> list[PictureMap]:
    """A sample's values over its pictures: a map per grid, the overview's behind that of the crops.

    Args:
        model: The model.
        batch: The batch that the values are of.
        sample: Index in the batch.
        values: One per position (of an encoder-decoder, per position of the encoder), text and padding of any value;
            where text cross-attends to a tower, one per key of the sample.
        images: The sample's pictures, as they were given to `prepare`.
        connector: Of this batch, for models with a resampler; made unless given.

    Raises:
        BadInputError: If there are not as many pictures as the sample has, values are not as many as positions, or it
            is not known which place in the picture a position has; it says why.
    """
    layout = batch.layout
    own = (layout.image_sample == sample).nonzero()[:, 0].tolist()
    if not 0 <= sample < len(batch) or len(own) != len(images):
        raise BadInputError(f"{len(images)} pictures were given for a sample of {len(own)}; give those of the batch")
    found = values.detach()
    if layout.kind == "cross":
        sheet, where = _attended(model, batch, sample, found, connector)
    else:
        width = batch.modality.shape[1]
        if tuple(found.shape) != (width,):
            raise BadInputError(f"values of shape {tuple(found.shape)} for {width} positions; give one each")
        sheet, where = found[None].expand(len(batch), -1), "sequence"
        if layout.kind == "resampled":
            whole = torch.zeros(batch.modality.shape, dtype=found.dtype, device=found.device)
            whole[sample] = found
            sheet, where = (connector or connector_map(model, batch)).on_patches(whole), "patches"
    return _read(model, batch, zip(own, images, strict=True), sheet[..., None], where)


def _read(
    model: HookedMM,
    batch: Batch,
    pictures: Iterable[tuple[int, Image.Image]],
    sheet: Tensor,
    where: Where,
) -> list[PictureMap]:
    """The grids of some images, given with their numbers in the batch."""
    names = {"sequence": ("grid", "overview"), "patches": ("patches", "patches_overview")}
    first, second = names.get(where, ("tokens", "tokens_overview"))
    made = []
    for number, (image, picture) in enumerate(pictures):
        place = batch.layout.images[image]
        for name, overview in ((first, False), (second, True)):
            # Without any grid the first is asked for, as it tells why there is none.
            if getattr(place, name) is None and (overview or getattr(place, second) is not None):
                continue
            grid = batch.layout.read(image, sheet, where, overview=overview)[..., 0]
            box = frame(model, picture, (grid.shape[0], grid.shape[1]), overview)
            made.append(PictureMap(number, overview, grid.cpu(), box))
    return made


def tower_maps(
    model: HookedMM, batch: Batch, sample: int, values: Float[Tensor, "..."], images: Sequence[Image.Image]
) -> list[PictureMap]:
    """What is said of patches in the tower, over a sample's pictures; as `picture_maps`.

    Args:
        model: The model.
        batch: The batch that the values are of.
        sample: Index in the batch.
        values: One per patch, laid out as a point of the tower is, class tokens included; without its width.
        images: The sample's pictures, as they were given to `prepare`.

    Raises:
        BadInputError: If there are not as many pictures as the sample has, or patches have no grid; it says why.
    """
    layout = batch.layout
    own = (layout.image_sample == sample).nonzero()[:, 0].tolist()
    if len(own) != len(images):
        raise BadInputError(f"{len(images)} pictures were given for a sample of {len(own)}; give those of the batch")
    # A width of one: a packed tower's values have no rows.
    return _read(model, batch, zip(own, images, strict=True), values.detach()[..., None], "patches")


def _attended(
    model: HookedMM, batch: Batch, sample: int, values: Tensor, connector: Connector | None
) -> tuple[Tensor, Where]:
    """Values of keys on the rows of the tower or projector."""
    layout = batch.layout
    rows = 0 if layout.tower_image is None else len(layout.tower_image)
    each = rows // len(batch)
    if not each or len(values) % each:
        raise BadInputError(f"{len(values)} values of keys for {each} pictures of a sample; give one per key")
    if connector_patterns(model):
        whole = values.new_zeros(len(batch), len(values))
        whole[sample] = values
        return (connector or connector_map(model, batch)).on_patches(whole), "patches"
    sheet = values.new_zeros(rows, len(values) // each)
    sheet[sample * each : (sample + 1) * each] = values.reshape(each, -1)
    return sheet, "tokens" if layout.tokens else "patches"


def on_pixels(
    maps: Sequence[PictureMap], picture: int, size: tuple[int, int], *, smooth: bool = True
) -> Float[Tensor, "height width"]:
    """All that maps say of one picture, per pixel: the sum of their densities; NaN where no map reaches.

    Args:
        maps: Of a sample.
        picture: Which of its pictures.
        size: (width, height) of the picture.
        smooth: As in `patch_maps.on_picture`.

    Raises:
        BadInputError: If no map is of this picture.
    """
    own = [one.density(size, smooth=smooth) for one in maps if one.picture == picture]
    if not own:
        raise BadInputError(f"no map is of picture {picture}; there are {sorted({one.picture for one in maps})}")
    known = torch.stack([~one.isnan() for one in own]).any(0)
    return torch.stack([one.nan_to_num() for one in own]).sum(0).masked_fill(~known, torch.nan)
