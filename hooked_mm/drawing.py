"""Pictures for reports: grids of samples, values drawn over a picture, thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from hooked_mm.errors import BadInputError


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side `side` pixels; small pictures keep hard pixel edges."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def grid(images: Sequence[Image.Image], columns: int, side: int = 128, gap: int = 6) -> Image.Image:
    """Images in rows of `columns`, each fitted into a square of `side` pixels, on white."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), "white")
    for index, image in enumerate(images):
        fitted = enlarge(image, side)
        x, y = gap + index % columns * (side + gap), gap + index // columns * (side + gap)
        sheet.paste(fitted, (x + (side - fitted.width) // 2, y + (side - fitted.height) // 2))
    return sheet


def data_uri(image: Image.Image) -> str:
    """The image as a PNG inside a `data:` address, for pages in a single file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def bounded_uri(image: Image.Image, side: int) -> str:
    """The image as a `data:` address, its longer side at most `side` pixels: as JPEG, or unharmed as PNG if tiny."""
    shown = enlarge(image, side) if max(image.size) > side else image
    if max(shown.size) <= 128:
        return data_uri(shown)
    buffer = io.BytesIO()
    shown.convert("RGB").save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def heat(values: Float[np.ndarray, "rows cols"], peak: float) -> UInt8[np.ndarray, "rows cols 4"]:
    """Colours with opacity for values: clear at 0, through orange to yellow at `peak`, through blue to cyan at -`peak`.

    NaN, where nothing is known, is clear.

    Raises:
        BadInputError: If `peak` is not positive.
    """
    if not peak > 0:
        raise BadInputError(f"peak={peak}; what is drawn in full colour must be above zero")
    share = np.nan_to_num(np.clip(np.asarray(values, float) / peak, -1, 1))
    size = np.abs(share)[..., None]
    # From dark to bright, so that strength shows without colour too.
    above = share[..., None] >= 0
    start, end = np.where(above, (200, 40, 0), (0, 50, 190)), np.where(above, (255, 225, 60), (90, 240, 255))
    colour = start + (end - start) * size
    return np.concatenate([colour, 255 * np.minimum(1, 1.25 * size)], axis=-1).round().astype(np.uint8)


def overlay(
    image: Image.Image,
    values: Float[np.ndarray, "rows cols"],
    box: tuple[float, float, float, float] | None = None,
    peak: float | None = None,
    side: int = 128,
) -> Image.Image:
    """A grid of values over a faded picture, each cell where it lies.

    Args:
        image: The picture.
        values: A value per cell; NaN is left clear.
        box: (left, top, right, bottom) in pixels of the picture that the grid covers (see `frames`); all of it unless
            given. What lies outside the picture is not shown.
        peak: The size of a value in full colour; the largest unless given.
        side: Of the drawn picture's longer side, in pixels.
    """
    large = enlarge(image.convert("RGB"), side)
    faded = Image.blend(large.convert("L").convert("RGB"), Image.new("RGB", large.size, (40, 40, 40)), 0.35)
    sizes = np.abs(values[np.isfinite(values)])
    peak = float(sizes.max(initial=0)) if peak is None else peak
    if not peak:
        return faded
    left, top, right, bottom = box or (0, 0, *image.size)
    across, down = large.width / image.width, large.height / image.height
    place = (round(left * across), round(top * down))
    size = (max(1, round(right * across) - place[0]), max(1, round(bottom * down) - place[1]))
    cells = Image.fromarray(heat(values, peak), "RGBA").resize(size, Image.Resampling.NEAREST)
    layer = Image.new("RGBA", large.size)
    layer.paste(cells, place)
    return Image.alpha_composite(faded.convert("RGBA"), layer).convert("RGB")


def titled(image: Image.Image, title: str, width: int) -> Image.Image:
    """The image in a white square of `width` pixels, below one line of text that is cut where it does not fit."""
    size = max(9, width // 14)
    font = ImageFont.load_default(size)
    while title and font.getlength(title) > width:
        title = title[:-2].rstrip() + "…" if len(title) > 2 else ""
    sheet = Image.new("RGB", (width, width + size + 6), "white")
    sheet.paste(image, ((width - image.width) // 2, size + 6 + (width - image.height) // 2))
    ImageDraw.Draw(sheet).text((1, 1), title, fill=(30, 30, 30), font=font)
    return sheet
