"""Pictures as visitors give them: files, and what the page's editor hands over; limits, masks, shapes.

| edit | what the model sees |
|---|---|
| `paint` | the picture with the strokes on it |
| `cover the brushed` | what was brushed in the picture's mean colour |
| `keep only the brushed` | all else in the picture's mean colour |

| shape | of a picture that is not square |
|---|---|
| `as the model does` | as it is: the model's own processor decides |
| `crop` | its middle |
| `pad` | bars in its mean colour |
| `stretch` | all of it, stretched |
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError

from hooked_mm.errors import BadInputError, unknown
from hooked_mm.prepare import load_image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Of files that are read; Pillow's other readers are never asked."""

MOST_PIXELS = 40_000_000
"""Of a picture; told from a file's head, before anything is unpacked."""

LONGEST = 4096
"""Pixels of the longer side of a picture as it is kept; no processor looks closer."""

EDITS = ("paint", "cover the brushed", "keep only the brushed")

Colour = tuple[int, int, int]


def check_size(size: tuple[int, int]) -> None:
    """Refuse a picture that is too large to unpack.

    Args:
        size: (width, height) in pixels.

    Raises:
        BadInputError: It says size and limit.
    """
    width, height = size
    if width * height > MOST_PIXELS:
        raise BadInputError(
            f"the picture has {width} x {height} pixels, {width * height / 1e6:.0f} million; at most "
            f"{MOST_PIXELS / 1e6:.0f} million are taken, so scale it down first"
        )


def bounded(image: Image.Image, longest: int = LONGEST) -> tuple[Image.Image, str]:
    """A picture whose longer side is at most so many pixels, and what was done to it; nothing for most."""
    longer = max(image.size)
    if longer <= longest:
        return image, ""
    size = (max(1, round(image.width * longest / longer)), max(1, round(image.height * longest / longer)))
    told = f"scaled from {image.width} x {image.height} to {size[0]} x {size[1]} pixels"
    return image.resize(size, Image.Resampling.LANCZOS), told


def check_head(source: bytes | Path) -> None:
    """Refuse a file by its head alone, before anything is unpacked.

    Args:
        source: The file's bytes, or its path (which an error does not name).

    Raises:
        BadInputError: If it is no picture of a known format, or too large.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as picture:
            size = picture.size
    except UnidentifiedImageError as error:
        raise BadInputError(f"this file is no picture that can be read; there are: {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise BadInputError(
            f"the picture is too large; at most {MOST_PIXELS / 1e6:.0f} million pixels are taken, scale it down first"
        ) from error
    # Pillow's readers end in errors of any kind where a file breaks their expectations.
    except Exception as error:
        raise BadInputError(f"this file can't be read as a picture ({type(error).__name__})") from error
    check_size(size)


def opened(source: str | os.PathLike | bytes) -> Image.Image:
    """The picture of a file, RGB, upright, the first frame if it moves; a very large one scaled down.

    Args:
        source: The file's bytes, or its path (which an error does not name).

    Raises:
        BadInputError: If it is no picture of a known format, too large, or broken.
    """
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise BadInputError(f"this file can't be read as a picture ({type(error).__name__})") from error
    check_head(data)
    return bounded(load_image(data))[0]


def mean_colour(image: Image.Image) -> Colour:
    """The mean of a picture's pixels."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64).reshape(-1, 3)
    red, green, blue = (int(value) for value in np.rint(pixels.mean(0)))
    return red, green, blue


def brushed(layers: list[Image.Image], size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """Where anything was drawn, on any layer, at least half opaque."""
    found = np.zeros((size[1], size[0]), dtype=bool)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A")
        if alpha.size != size:
            alpha = alpha.resize(size, Image.Resampling.NEAREST)
        found |= np.asarray(alpha) >= 128
    return found


def edited(value: Mapping[str, Any] | None, how: str = EDITS[0]) -> Image.Image | None:
    """The picture that the editor holds.

    Args:
        value: Of `gr.ImageEditor(type="pil")`: `background`, `layers` and `composite`.
        how: One of `EDITS`. Where nothing was brushed all of them give the picture as it is.

    Returns:
        RGB; None if nothing was loaded and nothing drawn.

    Raises:
        BadInputError: If `how` is none of them, or the picture is too large.
    """
    if how not in EDITS:
        raise unknown("edit", str(how)[:80], EDITS)
    if value is None:
        return None
    background, composite = value.get("background"), value.get("composite")
    layers = [layer for layer in value.get("layers") or () if layer is not None]
    for part in (background, composite, *layers):
        if part is not None:
            check_size(part.size)
    drawn = any(layer.convert("RGBA").getchannel("A").getbbox() is not None for layer in layers)
    if background is None and not drawn:
        return None
    seen = composite if composite is not None else background
    if seen is None:
        return None
    below = load_image(background if background is not None else seen)
    mask = brushed(layers, below.size)
    if how == "paint" or not mask.any():
        return bounded(load_image(seen))[0]
    hidden = mask if how == "cover the brushed" else ~mask
    pixels = np.array(below)
    pixels[hidden] = mean_colour(below)
    return bounded(Image.fromarray(pixels))[0]


def _crop(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _pad(image: Image.Image) -> Image.Image:
    side = max(image.size)
    sheet = Image.new("RGB", (side, side), mean_colour(image))
    sheet.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return sheet


def _stretch(image: Image.Image) -> Image.Image:
    side = max(image.size)
    return image.resize((side, side), Image.Resampling.BICUBIC)


SHAPERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as the model does": lambda image: image,
    "crop": _crop,
    "pad": _pad,
    "stretch": _stretch,
}
SHAPES = tuple(SHAPERS)


def squared(image: Image.Image, how: str = SHAPES[0]) -> Image.Image:
    """A picture made square, or left to the model.

    Raises:
        BadInputError: If `how` is none of `SHAPES`.
    """
    if how not in SHAPERS:
        raise unknown("shape", str(how)[:80], SHAPES)
    return image if image.width == image.height else SHAPERS[how](image)
