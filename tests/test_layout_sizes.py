"""Layouts of images that keep their own size: a patch of the picture is where its grid says, alone and among others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_mm.batch import Batch, batch_from_inputs
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs

# Rows and columns of the three pictures' patches, by hand: 8 x 8 pixels each.
SHAPES = {"mistral3": [(4, 4), (2, 4), (4, 2)], "lfm2_vl": [(4, 4), (2, 4), (6, 2)]}


def made(family: str) -> tuple[HookedMM, dict[str, Tensor], Batch]:
    """A miniature, its inputs and the batch of them."""
    model = HookedMM(miniature(family), check=False)
    inputs = miniature_inputs(model.hf_model)
    return model, inputs, batch_from_inputs(inputs, model.structure, model.hf_model.config)


def brighter(family: str, inputs: dict[str, Tensor], image: int, row: int, col: int) -> dict[str, Any]:
    """The same with one patch of one picture brighter."""
    pixels = inputs["pixel_values"].clone()
    if family == "lfm2_vl":
        pixels[image, row * SHAPES[family][image][1] + col] += 1
    else:
        pixels[image, :, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8] += 1
    return {**inputs, "pixel_values": pixels}


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize(("image", "row", "col"), [(0, 3, 1), (1, 1, 3), (2, 3, 0), (2, 0, 1)])
def test_a_patch_is_where_the_grid_says(family: str, image: int, row: int, col: int) -> None:
    """One brighter patch changes one place of what enters the tower: the one that the grid names."""
    model, inputs, batch = made(family)
    found = batch.layout.images[image].patches
    assert found is not None
    assert tuple(found.shape[:2]) == SHAPES[family][image]
    values = [
        model.run_with_cache(some, "vision.hook_embed")[1]["vision.hook_embed"]
        for some in (inputs, brighter(family, inputs, image, row, col))
    ]
    changed = (batch.layout.sheet(values[0]) != batch.layout.sheet(values[1])).any(dim=-1)
    assert changed.nonzero().tolist() == [found[row, col].tolist()]


@pytest.mark.parametrize("family", SHAPES)
def test_positions_follow_each_other_row_by_row(family: str) -> None:
    """Two by two patches are one position; each picture's are its sample's image positions, in reading order."""
    _, inputs, batch = made(family)
    for number, (rows, cols) in enumerate(SHAPES[family]):
        grid = batch.layout.images[number].grid
        assert grid is not None
        assert tuple(grid.shape) == (rows // 2, cols // 2)
        assert grid.flatten().tolist() == (inputs["input_ids"][number] == 150).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("family", SHAPES)
def test_a_choice_of_samples_is_that_of_their_pictures(family: str) -> None:
    """Two samples in another order: logits are theirs, and patches are found again."""
    model, _, batch = made(family)
    part = batch.take([2, 0])
    logits = [model.run_with_cache(some, "hook_logits")[0] for some in (batch, part)]
    torch.testing.assert_close(logits[1], logits[0][[2, 0]], rtol=0, atol=1e-5)
    whole = model.run_with_cache(batch, "vision.hook_embed")[1]["vision.hook_embed"]
    some = model.run_with_cache(part, "vision.hook_embed")[1]["vision.hook_embed"]
    for new, old in enumerate((2, 0)):
        grids = [
            layout.layout.read(number, value, "patches", overview=False)
            for layout, number, value in ((batch, old, whole), (part, new, some))
        ]
        torch.testing.assert_close(grids[1], grids[0], rtol=0, atol=1e-5)


def test_tiles_of_pages_by_their_marks() -> None:
    """A page of one tile, of 1 x 2 and of 2 x 2 with the whole behind: 8 x 8 patches and 2 x 2 tokens a tile."""
    _, inputs, batch = made("granite_docling")
    shapes = [(2, 2), (2, 4), (4, 4)]
    for number, shape in enumerate(shapes):
        found = batch.layout.images[number]
        assert found.grid is not None
        assert tuple(found.grid.shape) == shape
        assert (found.overview is None) == (number == 0)
        positions = found.grid.flatten().tolist()
        if found.overview is not None:
            positions += found.overview.flatten().tolist()
        assert sorted(positions) == (inputs["input_ids"][number] == 150).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"], ["one", "one"], ["two", "two"]])
def test_pages_of_a_sample_are_told_apart(order: list[str]) -> None:
    """Pages of one tile and of two with the whole, in one sample, in any order."""
    model, _, _ = made("granite_docling")
    pages = {"one": [160, 163, *[150] * 4, 161], "two": [160, 163, *[150] * 4, 160, 164, *[150] * 4, 161]}
    pages["two"] += [160, 162, *[150] * 4, 160]
    ids = torch.tensor([[1, *pages[order[0]], 9, *pages[order[1]], 9]])
    tiles = sum({"one": 1, "two": 3}[name] for name in order)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.ones(1, tiles, 3, 32, 32),
        "pixel_attention_mask": torch.ones(1, tiles, dtype=torch.bool),
    }
    batch = batch_from_inputs(inputs, model.structure, model.hf_model.config)
    grids = [image.grid for image in batch.layout.images]
    assert [None if grid is None else tuple(grid.shape) for grid in grids] == [
        {"one": (2, 2), "two": (2, 4)}[name] for name in order
    ]


def test_pictures_by_another_name() -> None:
    """Video-LLaVA calls its pictures otherwise; they are crops like any other: 4 x 4 patches, a position each."""
    model, inputs, batch = made("video_llava")
    assert "pixel_values" not in inputs
    assert [tuple(image.grid.shape) for image in batch.layout.images if image.grid is not None] == [(4, 4)] * 3
    _, cache = model.run_with_cache(inputs, "projector.hook_out")
    assert tuple(cache.select("projector.hook_out", modality="image").values.shape) == (48, 64)
