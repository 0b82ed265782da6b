"""Occlusion of a score that is linear in the pixels, where every drop is known; windows cover every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from analyses.occlusion import occlusion, windows
from hooked_mm.errors import BadInputError


def test_drops_of_a_linear_score_are_sums_of_what_is_covered() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (11, 14, 3), dtype=np.uint8)
    weights = rng.standard_normal(pixels.shape)
    sizes: list[int] = []

    def scores(images: Sequence[Image.Image]) -> Tensor:
        sizes.append(len(images))
        return torch.tensor([(np.asarray(one, float) * weights).sum() for one in images])

    found = occlusion(scores, Image.fromarray(pixels), 5, 2, colour=(7, 8, 9), batch_size=8)
    lost = ((pixels.astype(float) - np.array([7, 8, 9])) * weights).sum(-1)
    total, count = np.zeros((2, 11, 14))
    for top in (0, 2, 4, 6):
        for left in (0, 2, 4, 6, 8, 9):
            total[top : top + 5, left : left + 5] += lost[top : top + 5, left : left + 5].sum()
            count[top : top + 5, left : left + 5] += 1
    assert np.allclose(found.numpy(), total / count)
    assert max(sizes) == 8
    assert sum(sizes) == 1 + 4 * 6


@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)), window=st.integers(1, 20), share=st.floats(0.01, 1.0))
def test_every_pixel_is_covered_and_no_window_leaves_the_picture(
    size: tuple[int, int], window: int, share: float
) -> None:
    seen = np.zeros(size[::-1], bool)
    for left, top, right, bottom in windows(size, window, max(1, int(window * share))):
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        seen[top:bottom, left:right] = True
    assert seen.all()


def test_windows_that_leave_pixels_out_are_refused() -> None:
    with pytest.raises(BadInputError, match="windows of 4 pixels every 5"):
        windows((20, 20), 4, 5)
