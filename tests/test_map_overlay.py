"""Maps over pictures: what is known of the drawing is measured on its pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from analyses.map_overlay import SIGMA, blended, enlarged, is_empty, scale_of, told
from hooked_mm.errors import BadInputError

GREY = Image.new("RGB", (100, 60), (128, 128, 128))


def _heat(image: Image.Image) -> np.ndarray:
    """How far each pixel is from grey."""
    values = np.asarray(image, float)
    return values.max(axis=2) - values.min(axis=2)


def _cubic(t: float) -> float:
    """Keys' kernel with a = -1/2, as PIL's BICUBIC has it."""
    t = abs(t)
    if t <= 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def test_enlargement_is_bicubic_between_centres() -> None:
    """Written out with Keys' kernel, far from the rim; the ends of the range are kept."""
    values = torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = enlarged(values, (32, 32))
    for row, col in ((13, 14), (16, 19), (10, 21)):
        y, x = (row + 0.5) / 4 - 0.5, (col + 0.5) / 4 - 0.5
        expected = sum(
            _cubic(y - i) * _cubic(x - j) * float(values[i, j])
            for i in range(math.floor(y) - 1, math.floor(y) + 3)
            for j in range(math.floor(x) - 1, math.floor(x) + 3)
        )
        assert float(found[row, col]) == pytest.approx(min(max(expected, float(values.min())), float(values.max())))


def test_smoothing_is_a_gaussian_of_a_fiftieth_of_the_longer_side() -> None:
    """A bright column's profile over a large picture has the variance of the bicubic kernel's and the Gaussian's."""
    assert SIGMA == 0.02
    values = torch.zeros(400, 400)
    values[:, 200] = 1
    profile = enlarged(values, (400, 400), SIGMA * 400)[200]
    place = torch.arange(400, dtype=torch.float64)
    share = profile / profile.sum()
    mean = float((share * place).sum())
    assert mean == pytest.approx(200, abs=1e-6)
    assert float((share * (place - mean) ** 2).sum()) ** 0.5 == pytest.approx(8, rel=0.01)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([0.0, 2.0]))
def test_what_has_no_value_stays_clear_and_gives_nothing_to_its_neighbours(
    rows: int, cols: int, seed: int, sigma: float
) -> None:
    """Values lie within those known; NaN stays exactly on its own cells' pixels, whatever value it hides."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, cols, generator=generator)
    lacking = torch.rand(rows, cols, generator=generator) < 0.3
    found = enlarged(values.masked_fill(lacking, torch.nan), (cols * 5, rows * 4), sigma)
    assert torch.equal(found.isnan(), lacking.repeat_interleave(4, 0).repeat_interleave(5, 1))
    known = values[~lacking].double()
    if len(known):
        seen = found[~found.isnan()]
        assert float(seen.min()) >= float(known.min())
        assert float(seen.max()) <= float(known.max())


def test_a_nan_is_not_drawn() -> None:
    """Its pixels are the faded picture's, also beside the hottest cell; infinite values are refused."""
    values = torch.tensor([[1.0, torch.nan], [0.0, 0.5]])
    drawn = _heat(blended(GREY, values, side=100))
    assert (drawn[:30, 50:] == 0).all()
    assert drawn[:25, :40].min() > 60
    with pytest.raises(BadInputError, match="infinite value"):
        blended(GREY, torch.tensor([[1.0, math.inf]]))


def test_a_map_without_contrast_is_said_to_be_empty_and_not_drawn_as_noise() -> None:
    """Zero everywhere, equal everywhere, equal but for rounding, NaN everywhere: no colour at all, and words."""
    noise = 0.25 + 1e-9 * torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).double()
    for values in (torch.zeros(6, 10), torch.full((6, 10), 0.25), noise, torch.full((6, 10), torch.nan)):
        drawn = blended(GREY, values)
        assert (_heat(drawn) == 0).all()
        assert np.asarray(drawn).max() == 255, "nothing is written on it"
        assert told(values).startswith("empty")
    assert told(torch.full((2, 2), 0.25)) == "empty: 0.25 everywhere"
    assert told(torch.tensor([[0.25, 0.5]])) == "0.25 to 0.5"
    # In a common scale it is an honest map: all low, all in the middle.
    assert (_heat(blended(GREY, torch.full((6, 10), 0.25), scale=(0.25, 1.0))) == 0).all()
    assert _heat(blended(GREY, torch.full((6, 10), 0.5), scale=(0.25, 0.75))).min() > 50


def test_a_common_scale_keeps_maps_comparable() -> None:
    """By its own scale a weak map is as bright as a strong one; by the common one it is weaker."""
    strong = torch.tensor([[0.0, 1.0], [0.5, 0.2]])
    weak = strong / 10
    own = [_heat(blended(GREY, values)).max() for values in (strong, weak)]
    common = scale_of(strong, weak)
    assert common == (0.0, 1.0)
    shared = [_heat(blended(GREY, values, scale=common)).max() for values in (strong, weak)]
    assert own[0] == own[1] == shared[0]
    assert shared[1] < 0.3 * shared[0]
    assert scale_of(torch.full((2, 2), torch.nan)) == (0.0, 0.0)
    assert scale_of(torch.tensor([[-3.0, 1.0]]), signed=True) == (-3.0, 3.0)
    assert is_empty((2.0, 2.0))
    assert not is_empty((0.0, 1e-30))
    with pytest.raises(BadInputError, match=r"scale=\(1.0, 0.0\)"):
        blended(GREY, strong, scale=(1.0, 0.0))


def test_signed_maps_are_clear_at_zero() -> None:
    """Orange above, blue below."""
    drawn = np.asarray(blended(GREY, torch.tensor([[-1.0, 0.0, 0.0, 1.0]]), signed=True, side=200), int)
    red, blue = drawn[..., 0], drawn[..., 2]
    assert (blue - red)[:, :30].min() > 60
    assert (red - blue)[:, -30:].min() > 60
    assert np.abs(red - blue)[:, 95:105].max() < 30


def test_a_box_places_the_map_and_what_lies_outside_the_picture_is_not_shown() -> None:
    """The left half; and a padded canvas of which the picture is the middle."""
    values = torch.tensor([[0.0, 1.0]])
    drawn = _heat(blended(GREY, values, (0.0, 0.0, 50.0, 60.0), side=100))
    assert (drawn[:, 50:] == 0).all()
    assert drawn[:, 45:50].min() > 50
    drawn = _heat(blended(GREY, torch.tensor([[1.0], [0.0], [1.0]]), (0.0, -60.0, 100.0, 120.0), side=100))
    assert drawn.shape == (60, 100)
    assert drawn[28:32].max() == 0
    with pytest.raises(BadInputError, match=r"shape \(0, 3\)"):
        enlarged(torch.zeros(0, 3), (5, 5))
