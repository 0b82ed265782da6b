"""Layouts of models that are told where each image token goes, by pictures that show their own coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from tests.test_families import made

SIZES = ((72, 48), (48, 48), (48, 72), (56, 56))


def coordinates(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    pixels[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def model() -> HookedMM:
    """A small Molmo with random weights."""
    return HookedMM(*made("molmo"), check=False)


@pytest.fixture(scope="module")
def batch(model: HookedMM) -> Batch:
    """One picture, two, none and one, padded on the left."""
    pictures = [coordinates(*size) for size in SIZES]
    images = [[pictures[0]], pictures[1:3], None, [pictures[3]]]
    return model.prepare(images, ["what place is this ?", "red", "blue", "is there a ring ?"])


def test_which_image_is_whose(batch: Batch) -> None:
    """Images by sample; crops only of pictures, in batch order, the whole before its crops."""
    layout = batch.layout
    assert layout.kind == "crops"
    assert layout.image_sample.tolist() == [0, 1, 1, 3]
    crops = [3, 2, 3, 5]
    assert layout.tower_image.tolist() == [number for number, count in enumerate(crops) for _ in range(count)]
    assert (layout.patches, layout.tokens) == (144, 36)
    assert not layout.separator.any()


def test_patches_lie_where_they_are_in_the_picture(batch: Batch) -> None:
    """Stitched patches show growing coordinates along columns and rows, and the same in every row and column."""
    layout = batch.layout
    used = (batch.inputs["image_input_idx"] >= 0).any(dim=-1)
    crops = batch.inputs["images"][used]
    seen = crops.unflatten(-1, (16, 3)).mean(dim=-2)
    for number, (width, height) in enumerate(SIZES):
        for overview in (False, True):
            shown = layout.read(number, seen, "patches", overview=overview)
            # Without what is padding, and patches that are so in part.
            inside = shown[..., 2] == shown[..., 2].max()
            rows, cols = inside.any(dim=1).nonzero()[:, 0][1:-1], inside.any(dim=0).nonzero()[:, 0][1:-1]
            part = shown[rows][:, cols]
            across, down = part[..., 0].diff(dim=1), part[..., 1].diff(dim=0)
            assert (across > 0).all()
            assert (down > 0).all()
            assert part[..., 0].std(dim=0).max() < 0.02
            assert part[..., 1].std(dim=1).max() < 0.02
            # A step is as wide on both axes: pictures are scaled alike.
            ratio = float(across.mean() / down.mean()) * width / height
            assert ratio == pytest.approx(1, abs=0.1)


def test_positions_hold_the_tokens_that_the_grids_say(model: HookedMM, batch: Batch) -> None:
    """At each cell's position stands the output of the projector for that cell, added to the token's embedding."""
    _, cache = model.run_with_cache(batch, ["hook_embed", "projector.hook_out"])
    own = model.hf_model.get_input_embeddings()(batch.input_ids)
    added, out = cache["hook_embed"] - own, cache["projector.hook_out"]
    assert (added[batch.image_index < 0] == 0).all()
    for number in range(4):
        for overview in (False, True):
            there = batch.layout.read(number, added, "sequence", overview=overview)
            given = batch.layout.read(number, out, "tokens", overview=overview)
            torch.testing.assert_close(there, given, rtol=0, atol=1e-6)
            assert float(there.flatten(0, 1).std(dim=0).max()) > 0


def test_rows_end_in_marks(batch: Batch) -> None:
    """A grid's row is a run of image tokens, behind which stands the mark of a row."""
    for number, image in enumerate(batch.layout.images):
        words = batch.tokens[int(batch.image_sample[number])]
        for grid in (image.grid, image.overview):
            for row in grid.tolist():
                assert row == list(range(row[0], row[0] + len(row)))
                assert {words[place] for place in row} == {"<im_patch>"}
                assert words[row[-1] + 1] == "<im_col>"
            assert words[int(grid[-1, -1]) + 2] == "<im_end>"


def test_samples_can_be_taken(model: HookedMM, batch: Batch) -> None:
    """Alone, twice and without pictures: what is read of a sample is what it was in the whole batch."""
    _, whole = model.run_with_cache(batch, ["blocks.1.hook_resid_post", "vision.blocks.0.hook_resid_post"])
    for rows in ([1], [3, 0], [2], [0, 0, 2]):
        part = batch.take(rows)
        assert part.has_images == (rows != [2])
        _, found = model.run_with_cache(part, ["blocks.1.hook_resid_post"])
        for place, row in enumerate(rows):
            keep = part.modality[place] > 0
            one = found["blocks.1.hook_resid_post"][place][keep]
            torch.testing.assert_close(one, whole["blocks.1.hook_resid_post"][row][keep], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ids, index, token: ids[0].masked_fill_(ids[0] == token, 5), "0 tokens|image tokens for 0|tokens for 0"),
        (lambda ids, index, token: index[0].masked_fill_(index[0] == index[0].max(), -100), "does not name"),
    ],
)
def test_what_does_not_fit_is_refused(model: HookedMM, batch: Batch, change: object, said: str) -> None:
    """Positions without a crop, and crops without positions."""
    inputs = {name: value.clone() for name, value in batch.inputs.items()}
    change(inputs["input_ids"], inputs["image_input_idx"], model.structure.image_token_id)  # type: ignore[operator]
    with pytest.raises(BadInputError, match=said) as caught:
        model.run_with_cache(inputs, ())
    assert "sample 0" in str(caught.value)
