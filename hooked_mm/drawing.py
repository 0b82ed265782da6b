"""Pictures for reports: grids of samples, thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image


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
