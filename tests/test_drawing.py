"""Pictures for reports: right size, right place, nothing lost."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.drawing import bounded_uri, data_uri, enlarge, grid, heat, overlay
from hooked_mm.errors import BadInputError

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


def test_heat_by_hand() -> None:
    """Nothing is clear, the peak opaque yellow, its negative opaque cyan, more than the peak no other; NaN is clear."""
    drawn = heat(np.array([[0.0, 2.0, 4.0, -2.0, np.nan, 0.4]]), 2.0)[0]
    assert drawn[[0, 4], 3].tolist() == [0, 0]
    assert drawn[1].tolist() == drawn[2].tolist() == [255, 225, 60, 255]
    assert drawn[3].tolist() == [90, 240, 255, 255]
    # A fifth of the peak: a fifth of the way between the colours, a quarter opaque.
    assert drawn[5].tolist() == [211, 77, 12, 64]
    with pytest.raises(BadInputError, match="peak=0"):
        heat(np.zeros((1, 1)), 0)


def test_cells_lie_where_the_box_says() -> None:
    """The one bright cell covers its share of the box, cut at the picture's edge; nothing else changes."""
    image, values = noise(8, 4), np.array([[0.0, 1.0], [0.0, 0.0]])
    plain = np.asarray(overlay(image, 0 * values, side=80))
    assert plain.shape == (40, 80, 3)
    assert (plain[..., 0] == plain[..., 1]).all(), "faded to grey"
    for box, rows, cols in [
        (None, slice(0, 20), slice(40, 80)),
        ((0, 0, 4, 4), slice(0, 20), slice(20, 40)),
        # A square around the picture, as some processors pad it: the upper half of the upper cell is outside.
        ((0, -2, 8, 6), slice(0, 20), slice(40, 80)),
        ((-8, 0, 8, 8), slice(0, 40), slice(0, 80)),
    ]:
        changed = (np.asarray(overlay(image, values, box, side=80)) != plain).any(axis=-1)
        expected = np.zeros((40, 80), bool)
        expected[rows, cols] = True
        assert (changed == expected).all(), box


def test_a_common_peak_makes_pictures_comparable() -> None:
    """By its own peak every map has a bright cell; by a common one a weak map stays pale."""
    image, weak = noise(6, 6), np.array([[0.1, 0.0]])
    own, common = (np.asarray(overlay(image, weak, peak=peak)).astype(int) for peak in (None, 1.0))
    assert (own[0, 0] == (255, 225, 60)).all()
    assert (common[0, 0] < own[0, 0] - 50).any()


@pytest.mark.parametrize(
    ("size", "side", "kind"), [((900, 300), 600, "JPEG"), ((128, 40), 600, "PNG"), ((300, 200), 60, "PNG")]
)
def test_a_bounded_picture_is_as_large_as_allowed(size: tuple[int, int], side: int, kind: str) -> None:
    """Never enlarged; JPEG where pixels are many, and unharmed where they are few."""
    image = noise(*size)
    start, _, coded = bounded_uri(image, side).partition(",")
    got = Image.open(io.BytesIO(base64.b64decode(coded)))
    assert start == f"data:image/{kind.lower()};base64"
    assert got.format == kind
    assert max(got.size) == min(side, max(size))
    if kind == "PNG" and max(size) <= side:
        assert (np.asarray(got) == np.asarray(image)).all()
