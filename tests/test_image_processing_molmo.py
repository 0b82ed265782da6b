"""Molmo's crops against the reference: tilings, pixels, masks and order, of photographs of odd sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example as for_example
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.errors import BadInputError
from hooked_mm.molmo.image_processing_molmo import MolmoImageProcessor, choose_tiling
from tests.molmo_examples import SIZES, photograph
from tests.molmo_published import image_ids, published_preprocessor
from tests.molmo_reference import MOLMO_7B_D, Sizes, best_tiling, cropped

PIXEL_ERROR = 2e-4
"""A seventieth of a grey level: resizing in float32 against float64."""


def made_for(sizes: Sizes) -> MolmoImageProcessor:
    """With the settings of a published file."""
    return MolmoImageProcessor(**published_preprocessor(sizes))


def same_crops(picture: np.ndarray, sizes: Sizes) -> None:
    """Pixels, masks (where nothing and where everything is picture exactly), order, size of the stitched grid."""
    mine, got = cropped(picture, sizes, image_ids(sizes)), made_for(sizes).cut(Image.fromarray(picture))
    np.testing.assert_allclose(got.pixels.numpy(), mine.crops, atol=PIXEL_ERROR, rtol=0)
    np.testing.assert_allclose(got.masks.numpy(), mine.masks, atol=1e-6, rtol=0)
    for value in (0, 1, -1):
        np.testing.assert_array_equal(got.masks.numpy() == value, mine.masks == value)
    places = np.sort(mine.places[mine.places >= 0])
    order = np.where(mine.places < 0, -1, np.searchsorted(places, mine.places))
    np.testing.assert_array_equal(got.order.numpy(), order)
    assert sizes.cells**2 + got.rows * got.cols == len(places) == len(set(places))
    marks = (sizes.cells + 2) + (got.rows + 2)
    assert len(mine.tokens) == len(places) + marks


@given(height=st.integers(3, 260), width=st.integers(3, 260), seed=st.integers(0, 9))
@for_example(height=32, width=64, seed=0)  # nothing is left beside the margins
@for_example(height=31, width=200, seed=0)
@for_example(height=20, width=37, seed=0)  # in float64 the small picture comes out wider
@for_example(height=3, width=24, seed=0)
def test_photographs_of_odd_sizes(height: int, width: int, seed: int) -> None:
    """Small crops, so that many tilings come up."""
    if min(height, width) * 8 < max(height, width):
        height = width
    same_crops(photograph(height, width, seed), SIZES)


@pytest.mark.parametrize(("height", "width"), [(480, 641), (1201, 333), (100, 90)])
def test_photographs_at_the_published_sizes(height: int, width: int) -> None:
    """Crops of 336 pixels in patches of 14."""
    same_crops(photograph(height, width), MOLMO_7B_D)


@pytest.mark.parametrize(
    "sizes",
    [Sizes(margins=(2, 4)), Sizes(margins=(4, 0)), Sizes(max_crops=1), Sizes(max_crops=5, side=40, margins=(2, 2))],
)
def test_other_settings(sizes: Sizes) -> None:
    """Uneven margins, fewer crops, other windows."""
    same_crops(photograph(77, 203), sizes)


@given(height=st.integers(-112, 3000), width=st.integers(-112, 3000), most=st.sampled_from([1, 6, 12]))
@for_example(height=0, width=0, most=12)
@for_example(height=0, width=500, most=12)
@for_example(height=-8, width=5000, most=12)
@for_example(height=448, width=448, most=12)
@for_example(height=1000, width=1000, most=12)
def test_tilings_of_all_sizes(height: int, width: int, most: int) -> None:
    """What is left beside the margins may be nothing, or less."""
    assert choose_tiling(height, width, 224, most) == best_tiling(height, width, 224, most)


def test_known_tilings() -> None:
    """Worked out by hand: 224 pixels a window, 112 for the margins."""
    sizes = {(336, 336): (1, 1), (337, 336): (2, 1), (560, 784): (2, 3), (4000, 4000): (3, 3), (4000, 3000): (4, 3)}
    for (height, width), tiling in sizes.items():
        assert choose_tiling(height - 112, width - 112, 224, 12) == tiling


def test_a_square_photograph_of_one_crop() -> None:
    """Exactly as large as a crop: it is shown twice, unchanged, all of it picture, in row order."""
    picture = photograph(SIZES.side, SIZES.side)
    got = made_for(SIZES).cut(Image.fromarray(picture))
    assert got.pixels.shape == (2, SIZES.across**2, 3 * SIZES.patch**2)
    assert torch.equal(got.pixels[0], got.pixels[1])
    first = (picture[: SIZES.patch, : SIZES.patch] / 255 - np.array(made_for(SIZES).image_mean)) / made_for(
        SIZES
    ).image_std
    np.testing.assert_allclose(got.pixels[0, 0].numpy(), first.reshape(-1), atol=1e-6)
    assert got.masks.tolist() == [[1.0] * SIZES.across**2, [-1.0] * SIZES.across**2]
    assert got.order.flatten().tolist() == list(range(2 * SIZES.cells**2))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pictures_that_are_not_rgb(mode: str) -> None:
    """They become so first."""
    picture = Image.fromarray(photograph(60, 70)).convert(mode)
    got, plain = made_for(SIZES).cut(picture), made_for(SIZES).cut(picture.convert("RGB"))
    assert torch.equal(got.pixels, plain.pixels)


def test_a_strip_of_which_nothing_is_left() -> None:
    """The original fails in its resizing; here it is said why."""
    with pytest.raises(BadInputError, match="too narrow"):
        made_for(SIZES).cut(Image.fromarray(photograph(2, 2000)))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"overlap_margins": [3, 4]}, "even"),
        ({"overlap_margins": [12, 12]}, "leave"),
        ({"image_token_length_h": 11}, "square"),
        ({"base_image_input_size": [336, 350]}, "336, 350"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(BadInputError, match=reason):
        MolmoImageProcessor(**settings)


def test_the_published_file_and_back(tmp_path: Path) -> None:
    """Its settings are kept and written again, without the remote code's names."""
    published = published_preprocessor(MOLMO_7B_D)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    made = MolmoImageProcessor.from_pretrained(tmp_path)
    assert made.to_dict() == MolmoImageProcessor().to_dict()
    made.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "preprocessor_config.json").read_text())
    auto = published.pop("auto_map")
    assert not auto.keys() & again.keys()
    assert "auto_map" not in again
    assert {name: again[name] for name in published if name != "processor_class"} == {
        name: value for name, value in published.items() if name != "processor_class"
    }
