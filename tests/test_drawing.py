"""Pictures for reports: right size, right place, nothing lost."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.drawing import data_uri, enlarge, grid

SIDES = st.integers(1, 90)


def noise(width: int, height: int) -> Image.Image:
    """A picture of random pixels."""
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(SIDES, SIDES, SIDES)
def test_the_longer_side_is_as_asked(width: int, height: int, side: int) -> None:
    """Up or down, the longer side is `side`; the shorter one follows to the nearest pixel, and never vanishes."""
    got = enlarge(noise(width, height), side)
    assert max(got.size) == side
    exact = min(width, height) * side / max(width, height)
    assert min(got.size) == 1 or abs(min(got.size) - exact) <= 0.5 + 1e-9
    assert (got.width >= got.height) == (width >= height) or got.width == got.height


@given(st.integers(2, 9), SIDES, st.integers(1, 9))
def test_small_pictures_keep_hard_edges(factor: int, width: int, height: int) -> None:
    """By a whole factor every pixel becomes a block of its own colour."""
    image = noise(width, height)
    got = np.asarray(enlarge(image, factor * max(width, height)))
    assert (got == np.asarray(image).repeat(factor, axis=0).repeat(factor, axis=1)).all()


def test_large_pictures_are_averaged() -> None:
    """A fine chequerboard made small is grey, neither black nor white."""
    board = np.indices((128, 128)).sum(0) % 2 * 255
    got = np.asarray(enlarge(Image.fromarray(board.astype(np.uint8)).convert("RGB"), 16))
    assert np.abs(got.astype(int) - 127).max() <= 3


@given(st.integers(1, 7), st.integers(1, 4), st.integers(4, 20), st.integers(0, 5))
def test_every_picture_stands_in_its_cell(count: int, columns: int, side: int, gap: int) -> None:
    """Cell by cell, row by row: the picture's colour inside, white between the cells and in empty ones."""
    colours = [(10 + 30 * n, 200 - 25 * n, 5 * n) for n in range(count)]
    sheet = np.asarray(grid([Image.new("RGB", (3, 3), colour) for colour in colours], columns, side, gap))
    rows = -(-count // columns)
    assert sheet.shape == (rows * (side + gap) + gap, columns * (side + gap) + gap, 3)
    expected = np.full(sheet.shape, 255)
    for index, colour in enumerate(colours):
        top, left = (gap + cell * (side + gap) for cell in divmod(index, columns))
        expected[top : top + side, left : left + side] = colour
    assert (sheet == expected).all()


def test_oblong_pictures_are_centred() -> None:
    """A picture twice as wide as high leaves the same white above and below."""
    sheet = np.asarray(grid([Image.new("RGB", (8, 4), "red")], 1, side=16, gap=0))
    assert (sheet[4:12] == (255, 0, 0)).all()
    assert (sheet[:4] == 255).all()
    assert (sheet[12:] == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_data_uri_holds_the_picture(mode: str) -> None:
    """What a browser decodes from the address is the picture, pixel for pixel."""
    image = noise(7, 5).convert(mode)
    head, _, body = data_uri(image).partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(body, validate=True))) as decoded:
        assert decoded.format == "PNG"
        assert decoded.mode == mode
        assert decoded.tobytes() == image.tobytes()
