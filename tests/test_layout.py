"""Places of images in sequences and tower rows, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from hooked_mm.layout import ImageLayout, Layout, Plan, cells, place_images, stitch
from hooked_mm.layout_kinds import read_layout
from hooked_mm.layout_source import Source


def layout(**facts: object) -> Layout:
    """A layout of one sample without positions."""
    nothing = torch.zeros(1, 0)
    given_facts = {
        "kind": "crops",
        "image_sample": torch.tensor([0]),
        "image_index": nothing.long(),
        "separator": nothing.bool(),
    }
    return Layout(**{**given_facts, **facts})


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_stitching_is_cutting_backwards(rows: int, cols: int, high: int, wide: int) -> None:
    """Crops cut from a numbered sheet, stitched again, give the sheet."""
    sheet = torch.arange(rows * high * cols * wide).view(rows * high, cols * wide)
    crops = [sheet[r * high : (r + 1) * high, c * wide : (c + 1) * wide] for r in range(rows) for c in range(cols)]
    assert torch.equal(stitch(crops, rows, cols), sheet)


def test_cells_count_row_by_row() -> None:
    """Also in a crop filled up to a larger width."""
    assert cells(3, 2, 2).tolist() == [[[3, 0], [3, 1]], [[3, 2], [3, 3]]]
    assert cells(0, 2, 2, width=5, start=10)[..., 1].tolist() == [[10, 11], [15, 16]]


@pytest.mark.parametrize(
    ("tiles", "size", "width", "expected"),
    [
        (1, 4, 4, [0, 1, 2, 3]),
        (1, 4, 5, [-1, 0, 1, 2, 3]),
        (2, 2, 8, [-1, 0, 1, -2, -1, 2, 3, -2]),
        (1, 4, 6, None),
        (1, 4, 3, None),
        (2, 2, 5, None),
        (1, 0, 3, None),
    ],
)
def test_places_in_a_row(tiles: int, size: int, width: int, expected: list[int] | None) -> None:
    """Class tokens lead, padding follows (where a row has tiles); widths that do not fit are none."""
    found = layout(tiles=tiles).places(width, size)
    assert (None if found is None else found.tolist()) == expected


def test_positions_are_given_image_by_image() -> None:
    """Two images in the first sample, none in the second, one in the third; separators and text between."""
    image = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [0] * 7, [1, 1, 0, 0, 0, 0, 0]]).bool()
    pair = ImageLayout(grid=torch.tensor([[0, 1]]))
    line = Plan(ImageLayout(grid=torch.tensor([[1, -1]]), overview=torch.tensor([[0]])), 3, torch.tensor([2]))
    none = torch.zeros(0, dtype=torch.long)
    sample, index, separator, images = place_images(image, [Plan(pair, 2, none), line, Plan(pair, 2, none)])
    assert sample.tolist() == [0, 0, 2]
    assert index.tolist() == [[-1, 0, 0, -1, 1, 1, 1], [-1] * 7, [2, 2, -1, -1, -1, -1, -1]]
    assert separator.nonzero().tolist() == [[0, 6]]
    assert [item.grid.tolist() for item in images] == [[[1, 2]], [[5, -1]], [[0, 1]]]
    assert images[1].overview.tolist() == [[4]]
    with pytest.raises(BadInputError, match=r"sample 0: has 5 image positions, but its 3 images take 6"):
        place_images(image, [Plan(pair, 2, none)] * 3)
    with pytest.raises(BadInputError, match="the batch has 4 images, but image positions only for 3"):
        place_images(image, [Plan(pair, 2, none), line, Plan(pair, 2, none), Plan(pair, 2, none)])


def test_a_grid_is_read_where_it_lies() -> None:
    """Positions of the sample, -1 as NaN; patches behind a class token; what does not fit is refused."""
    lies = ImageLayout(grid=torch.tensor([[2, -1], [0, 1]]), patches=cells(0, 2, 2), tokens=cells(0, 1, 2))
    of = layout(images=(lies,), tower_image=torch.tensor([0]), patches=4, tokens=2)
    text = torch.arange(3.0).view(1, 3, 1)
    read = of.read(0, text, "sequence", overview=False)
    assert read[..., 0].nan_to_num(-1).tolist() == [[2, -1], [0, 1]]
    tower = torch.arange(5.0).view(1, 5, 1)
    assert of.read(0, tower, "patches", overview=False)[..., 0].tolist() == [[1, 2], [3, 4]]
    assert of.fits_patches(tower)
    assert not of.fits_patches(tower[:, :2])
    assert of.read(0, tower[:, :2], "tokens", overview=False)[..., 0].tolist() == [[0, 1]]
    with pytest.raises(BadInputError, match="rows of 9 places do not fit crops of 4 patches"):
        of.read(0, torch.zeros(1, 9, 1), "patches", overview=False)
    with pytest.raises(BadInputError, match="image 0 has no overview of sequence: it was shown to the tower once"):
        of.read(0, text, "sequence", overview=True)


def test_owners_of_packed_and_padded_rows() -> None:
    """A pack is one row, also merged; padding patches and rows belong to no image; other sizes are refused."""
    owner = torch.tensor([0] * 8 + [1] * 4)
    packed = layout(kind="packed", tower_image=owner, tower_order=torch.arange(12))
    assert packed.owners(1, 12).tolist() == [owner.tolist()]
    assert packed.owners(1, 3).tolist() == [[0, 0, 1]]
    assert packed.sheet(torch.zeros(12, 5)).shape == (1, 12, 5)
    padded = layout(
        tower_image=torch.tensor([0, -1]), valid=torch.tensor([[True, False, True], [False] * 3]), patches=3
    )
    assert padded.owners(2, 4).tolist() == [[0, 0, -1, 0], [-1] * 4]
    with pytest.raises(BadInputError, match="3 x 4 patches does not fit the 2 rows"):
        padded.owners(3, 4)


def test_longer_batches_have_text_behind() -> None:
    """New positions belong to no image."""
    of = layout(image_index=torch.tensor([[0, 0]]), separator=torch.tensor([[False, True]])).pad(2)
    assert of.image_index.tolist() == [[0, 0, -1, -1]]
    assert of.separator.tolist() == [[False, True, False, False]]


def test_a_batch_whose_order_is_not_known_says_so() -> None:
    """Positions of images are known and their places in the picture are not: whatever asks for these hears why."""
    image = torch.tensor([[False, True, True, False, True, True, False]])
    inputs = {"input_ids": torch.tensor([[1, 5, 5, 9, 5, 5, 2]]), "pixel_values": torch.zeros(3, 7)}
    found = read_layout(Source(inputs, image, object()))
    assert found.kind == "runs"
    # Two runs of equal length with one token between them are the rows of one image.
    assert found.image_index.tolist() == [[-1, 0, 0, -1, 0, 0, -1]]
    for ask in (lambda: found.owners(1, 3), lambda: found.read(0, torch.zeros(1, 7, 2), "sequence", overview=False)):
        with pytest.raises(BadInputError, match=r"is not known.*layout_kinds\.py|no grid.*layout_kinds\.py"):
            ask()
