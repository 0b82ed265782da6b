"""Pictures with crops that run through the tower on their own: positions are known, tower and projector are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature
from hooked_mm.testing.recipe import IMAGE_TOKEN
from tests.families import close

CROPS = (2, 0, 1)


@pytest.fixture(scope="module")
def model() -> HookedMM:
    """Step's miniature, not checked: its own batches have no crops."""
    return HookedMM(miniature("step3p7"), check=False)


def inputs() -> dict[str, Tensor]:
    """One picture per sample, of 2 x 2 tokens, behind its crops of one token each, each part between marks."""
    generator = torch.Generator().manual_seed(0)
    rows = [[1, 5, *[160, IMAGE_TOKEN, 161] * count, 162, *[IMAGE_TOKEN] * 4, 163, 7] for count in CROPS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "pixel_values": torch.randn(3, 3, 64, 64, generator=generator),
        "pixel_values_local": torch.randn(sum(CROPS), 3, 32, 32, generator=generator),
        "num_local_patches": torch.tensor(CROPS),
    }


def test_each_image_has_its_crops_and_the_whole(model: HookedMM) -> None:
    """Six, four and five positions; the last four are the picture, row by row."""
    batch = inputs()
    _, cache = model.run_with_cache(batch, "blocks.*.hook_resid_*")
    image = batch["input_ids"] == IMAGE_TOKEN
    found = cache.batch
    assert found.image_sample.tolist() == [0, 1, 2]
    assert [int((found.image_index == number).sum()) for number in range(3)] == [6, 4, 5]
    assert torch.equal(found.image_index >= 0, image)
    for number, layout in enumerate(found.layout.images):
        grid = layout.overview if CROPS[number] else layout.grid
        assert grid.flatten().tolist() == image[number].nonzero()[-4:, 0].tolist()
    with torch.no_grad():
        expected = model.hf_model(**batch).logits
    logits, _ = model.run_with_cache(batch, "hook_embed")
    assert close(logits, expected) == 0


@pytest.mark.parametrize("name", ["projector.hook_out", "vision.blocks.0.hook_resid_post"])
def test_the_tower_runs_twice_and_is_refused(model: HookedMM, name: str) -> None:
    """A point could show the first run alone."""
    with pytest.raises(BadInputError, match="times"):
        model.run_with_cache(inputs(), name)
