"""Layout of images that text attends to."""

from __future__ import annotations

import pytest
import torch

from hooked_mm.layout_attended import WHY
from hooked_mm.layout_kinds import read_layout
from hooked_mm.layout_source import Source

NOTHING = torch.zeros(2, 5, dtype=torch.bool)


@pytest.mark.parametrize("name", ["pixel_values", "flattened_patches"])
def test_a_picture_per_sample(name: str) -> None:
    """Each row is an image of its own sample, and none has a position."""
    pictures = torch.randn(2, 3, 4, 4) if name == "pixel_values" else torch.randn(2, 6, 14)
    layout = read_layout(Source({name: pictures}, NOTHING, None, attended=True))
    assert layout.kind == "cross"
    assert layout.image_sample.tolist() == [0, 1]
    assert bool((layout.image_index == -1).all())
    assert layout.why == WHY


def test_slots_of_samples_may_be_empty() -> None:
    """(b, images, 3, h, w): a slot of zeros holds no image."""
    pictures = torch.randn(2, 2, 3, 4, 4)
    pictures[0, 1] = 0
    layout = read_layout(Source({"pixel_values": pictures}, NOTHING, None, attended=True))
    assert layout.image_sample.tolist() == [0, 1, 1]
    assert layout.tower_image is not None
    assert layout.tower_image.tolist() == [0, -1, 1, 2]
