"""A map over a picture as people read it: scaled, enlarged, smoothed, blended; the one style of all maps over pictures.

    scale    (value - low) / (high - low), low and high of the map itself, or a common scale of several
    enlarge  bicubic, from patches (or pixels) to the pixels drawn
    smooth   Gaussian, sigma = .02 * max(height, width) of the picture as drawn
    blend    over the faded picture: clear at the low end, through orange to yellow at the high end

This is the notebooks' overlay (LVLM-Interpret, the Grad-CAM study). A map without contrast would be stretched until its
rounding errors look like a finding: such a map is said to be empty instead.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt, gaussian_filter
from torch import Tensor

from hooked_mm.drawing import enlarge, heat
from hooked_mm.errors import BadInputError
from hooked_mm.frames import Box

SIGMA = 0.02
"""Of the Gaussian, as a share of the longer side."""

CONTRAST = 1e-6
"""A scale whose ends differ by less than this share of them holds nothing but rounding errors."""

SIDE = 256
"""Pixels of the longer side of a drawn picture."""

Scale = tuple[float, float]
"""The values at the low and the high end of the colours."""


def scale_of(*maps: Float[Tensor, "rows cols"], signed: bool = False) -> Scale:
    """The common scale of maps; of one map alone, its own.

    Args:
        maps: NaN does not count.
        signed: Around zero: (-peak, peak).

    Returns:
        (low, high); (0, 0) if no map has any value.

    Raises:
        BadInputError: If a value is infinite.
    """
    known = [values[~values.isnan()].double() for values in maps]
    if any(bool(values.isinf().any()) for values in known):
        raise BadInputError("a map holds an infinite value, beside which nothing else would show; leave it out as NaN")
    every = torch.cat([values.reshape(-1) for values in known]) if known else torch.zeros(0)
    if not len(every):
        return 0.0, 0.0
    peak = float(every.abs().max())
    return (-peak, peak) if signed else (float(every.min()), float(every.max()))


def is_empty(scale: Scale) -> bool:
    """Whether a scale has no contrast: its ends are equal, but for rounding."""
    low, high = scale
    return not high - low > CONTRAST * max(abs(low), abs(high))


def told(values: Float[Tensor, "rows cols"], signed: bool = False) -> str:
    """What a caption says of a map: its own least and greatest value, or that it is empty."""
    low, high = scale_of(values)
    if bool(values.isnan().all()):
        return "empty: no value"
    empty = is_empty(scale_of(values, signed=signed))
    return f"empty: {high:.3g} everywhere" if empty else f"{low:.3g} to {high:.3g}"


def enlarged(
    values: Float[Tensor, "rows cols"], size: tuple[int, int], sigma: float = 0.0
) -> Float[Tensor, "height width"]:
    """A map on more pixels: bicubic between the centres of cells, then a Gaussian; beyond the rim as at the rim.

    Args:
        values: NaN where there is no value.
        size: (width, height) in pixels.
        sigma: Of the Gaussian, in pixels; 0 for none.

    Returns:
        float64, never beyond the least and greatest value given; NaN on the pixels of cells without a value, which
        nothing of their neighbours' values is spread over.

    Raises:
        BadInputError: If the map has no cells.
    """
    if values.ndim != 2 or not values.numel() or min(size) < 1:
        raise BadInputError(f"a map of shape {tuple(values.shape)} on {size} pixels; give (rows, cols), one at least")
    wide = values.detach().double().cpu()
    lacking = wide.isnan()
    shape = (size[1], size[0])
    if bool(lacking.all()):
        return torch.full(shape, torch.nan, dtype=torch.float64)
    low, high = float(wide[~lacking].min()), float(wide[~lacking].max())
    if bool(lacking.any()):
        # Each cell without a value as its nearest with one, so that no made-up value is drawn into the others.
        nearest = distance_transform_edt(lacking.numpy(), return_distances=False, return_indices=True)
        wide = wide[tuple(torch.from_numpy(nearest.copy()).long())]
    smooth = torch.nn.functional.interpolate(wide[None, None], shape, mode="bicubic", antialias=True)[0, 0]
    if sigma > 0:
        smooth = torch.from_numpy(gaussian_filter(smooth.numpy(), sigma, mode="nearest"))
    down = ((torch.arange(shape[0]) + 0.5) / shape[0] * wide.shape[0]).long()
    across = ((torch.arange(shape[1]) + 0.5) / shape[1] * wide.shape[1]).long()
    # Bicubic interpolation shoots over.
    return smooth.clamp(low, high).masked_fill(lacking[down][:, across], torch.nan)


def blended(
    image: Image.Image,
    pixels: Float[Tensor, "rows cols"],
    box: Box | None = None,
    *,
    scale: Scale | None = None,
    signed: bool = False,
    side: int = SIDE,
) -> Image.Image:
    """A map over a picture.

    Args:
        image: The picture.
        pixels: A value per pixel of the picture, or per patch; NaN, where the model has none, stays clear.
        box: The part of the picture that the map covers, in its pixels (`hooked_mm.frames`); all of it unless given.
        scale: Values at the ends of the colours, a common one of several maps (`scale_of`); the map's own unless given.
        signed: The map has a sign: clear at zero, above it orange, below it blue.
        side: Of the drawn picture's longer side, in pixels.

    Returns:
        The picture with the map; one that says "empty map" where the scale has no contrast.

    Raises:
        BadInputError: If a value is infinite, the scale is upside down, or the map has no cells.
    """
    low, high = own = scale_of(pixels, signed=signed) if scale is None else scale
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise BadInputError(f"scale=({low}, {high}); its ends must be finite numbers, the lower one first")
    large = enlarge(image.convert("RGB"), side)
    # Grey, as colours are the map's.
    faded = Image.blend(large.convert("L").convert("RGB"), Image.new("RGB", large.size, (40, 40, 40)), 0.35)
    if is_empty(own) or bool(pixels.isnan().all()):
        return _said(faded, "empty map")
    left, top, right, bottom = box or (0.0, 0.0, float(image.width), float(image.height))
    across, down = large.width / image.width, large.height / image.height
    place = (round(left * across), round(top * down))
    size = (max(1, round(right * across) - place[0]), max(1, round(bottom * down) - place[1]))
    smooth = enlarged(pixels, size, SIGMA * max(large.size))
    peak = max(abs(low), abs(high))
    share = smooth / peak if signed else (smooth - low) / (high - low)
    cells = Image.fromarray(heat(share.clamp(-1.0 if signed else 0.0, 1).numpy(), 1.0), "RGBA")
    layer = Image.new("RGBA", large.size)
    layer.paste(cells, place)
    # The picture shines through even where the map is highest.
    layer.putalpha(Image.fromarray((np.asarray(layer.getchannel("A")) * 0.8).astype(np.uint8)))
    return Image.alpha_composite(faded.convert("RGBA"), layer).convert("RGB")


def _said(image: Image.Image, text: str) -> Image.Image:
    """The picture with a line of text in its middle."""
    font = ImageFont.load_default(max(10, image.width // 12))
    draw = ImageDraw.Draw(image)
    middle = (image.width / 2, image.height / 2)
    draw.rectangle(draw.textbbox(middle, text, font=font, anchor="mm"), fill=(255, 255, 255))
    draw.text(middle, text, fill=(30, 30, 30), font=font, anchor="mm")
    return image
