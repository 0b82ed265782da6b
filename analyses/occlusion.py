"""Occlusion: what a prediction's score loses when a window of the picture is covered (Zeiler and Fergus 2014).

arXiv 1311.2901. With s the score and x_W the picture whose pixels in the window W are of one colour,

    drop(W) = s(x) - s(x_W),        map at a pixel = mean of drop(W) over the windows W that cover it

The model is only run, never looked into: nothing is assumed of it, at the price of a pass per window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from PIL import Image
from torch import Tensor

from hooked_mm.errors import BadInputError

Scores = Callable[[Sequence[Image.Image]], Float[Tensor, " n"]]
"""The score of one question about each of some pictures."""


def windows(size: tuple[int, int], window: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of windows over a picture of (width, height), the last of each row at its edge.

    Raises:
        BadInputError: If they would leave pixels out, or none fits.
    """
    if not 0 < stride <= window or min(size) < 1:
        raise BadInputError(f"windows of {window} pixels every {stride} over {size}; the stride is 1 to the window")

    def starts(length: int) -> list[int]:
        last = max(0, length - window)
        return sorted({*range(0, last, stride), last})

    width, height = size
    return [
        (left, top, min(left + window, width), min(top + window, height))
        for top in starts(height)
        for left in starts(width)
    ]


def cover(pixels: UInt8[np.ndarray, "h w 3"], colour: tuple[int, int, int] | None = None) -> UInt8[np.ndarray, "3"]:
    """What covered pixels become: a colour, or the picture's mean."""
    return np.rint(pixels.reshape(-1, 3).mean(0)).astype(np.uint8) if colour is None else np.array(colour, np.uint8)


def occlusion(
    scores: Scores,
    image: Image.Image,
    window: int,
    stride: int | None = None,
    *,
    colour: tuple[int, int, int] | None = None,
    batch_size: int = 32,
) -> Float64[Tensor, "height width"]:
    """What the score loses under each pixel's windows.

    Args:
        scores: Of pictures; called with at most `batch_size`.
        image: The picture.
        window: Side of the covered square, in pixels.
        stride: From one window to the next; half a window unless given.
        colour: Of the cover; the picture's mean unless given.
        batch_size: Pictures at a time.

    Raises:
        BadInputError: As in `windows`.
    """
    pixels = np.array(image.convert("RGB"))
    fill = cover(pixels, colour)
    boxes = windows(image.size, window, stride or max(1, window // 2))

    def covered() -> Iterator[Image.Image]:
        yield Image.fromarray(pixels)
        for left, top, right, bottom in boxes:
            changed = pixels.copy()
            changed[top:bottom, left:right] = fill
            yield Image.fromarray(changed)

    found = torch.cat([scores(part).detach().double().cpu() for part in in_parts(covered(), batch_size)])
    total, count = torch.zeros(2, *pixels.shape[:2], dtype=torch.float64)
    for (left, top, right, bottom), value in zip(boxes, found[1:], strict=True):
        total[top:bottom, left:right] += found[0] - value
        count[top:bottom, left:right] += 1
    return total / count


def in_parts(images: Iterator[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    """So many at a time."""
    part: list[Image.Image] = []
    for image in images:
        part.append(image)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
