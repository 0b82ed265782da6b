"""Layouts of every family against real models with random weights: pixels, patches, tokens and positions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.batch import Batch, batch_from_inputs
from hooked_mm.errors import BadInputError
from hooked_mm.layout import Layout
from tests.processors import FAMILIES, idefics2, processor
from tests.tiny import batch_of, picture, points, position_wise, run, structure, tiny

ONE_IMAGE = ("blip-2", "florence2")
"""Families that take one image per prompt."""
FITTING = {"llava": [(48, 48), (96, 96)], "mllama": [(32, 32), (64, 16), (16, 64), (48, 16), (16, 32)]}
"""Shapes that a processor neither cuts off nor fills up, where it does so with others."""
SIZES = st.tuples(st.integers(16, 60), st.integers(16, 60))


@st.composite
def pictures_of(draw: st.DrawFn, family: str) -> list[list[tuple[int, int]]]:
    """Sizes of the pictures of one to three samples: none, one or up to three each, at least one in all."""
    most = 1 if family in ONE_IMAGE else 3
    samples = draw(st.lists(st.lists(SIZES, min_size=int(family in ONE_IMAGE), max_size=most), min_size=1, max_size=3))
    return samples if any(samples) else [[draw(SIZES)], *samples[1:]]


def made(family: str, sizes: list[list[tuple[int, int]]], side: str, changed: int | None = None) -> Batch:
    """A batch of noise pictures, one of them (by number) with other noise."""
    number, pictures = 0, []
    for sample in sizes:
        pictures.append([])
        for size in sample:
            pictures[-1].append(picture(*size, seed=1000 if number == changed else number))
            number += 1
    return batch_of(family, pictures, side)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4)
@given(data=st.data())
def test_an_image_changes_its_positions_and_no_others(family: str, data: st.DataObject) -> None:
    """Other pixels in one image: the embeddings change exactly at its positions, separators left out."""
    sizes = data.draw(pictures_of(family))
    side = data.draw(st.sampled_from(["left", "right"]))
    count = sum(map(len, sizes))
    changed = data.draw(st.integers(0, count - 1))
    batch, other = made(family, sizes, side), made(family, sizes, side, changed)
    assert batch.image_sample.tolist() == [row for row, sample in enumerate(sizes) for _ in sample]
    first, second = run(family, batch), run(family, other)
    moved = (first["hook_embed"] != second["hook_embed"]).any(dim=-1)
    expected = (batch.image_index == changed) & ~batch.separator
    assert torch.equal(moved, expected)
    if family != "florence2":
        value, new = (batch.layout.sheet(cache["vision.hook_embed"]) for cache in (first, second))
        moved = (value != new).flatten(2).any(dim=-1)
        owners = batch.layout.owners(*value.shape[:2])
        assert not (moved & (owners >= 0) & (owners != changed)).any()
        sample = int(batch.image_sample[changed])
        number = int((batch.image_sample[:changed] == sample).sum())
        before, after = (cache.grid("vision.hook_embed", sample)[number] for cache in (first, second))
        own = before != after
        # Canvases may have empty borders.
        assert own.any(dim=-1).all() if batch.layout.kind in ("crops", "packed", "resampled") else own.any()
    raw = batch_from_inputs(batch.inputs, structure(family), tiny(family).config)
    assert torch.equal(raw.image_index, batch.image_index)
    assert torch.equal(raw.separator, batch.separator)
    assert torch.equal(raw.modality, batch.modality)


def whole_cells(layout: Layout, image: int) -> tuple[int, int, int, int]:
    """Of the patches' grid the part that shows the picture itself: top, left, rows, cols."""
    lies, cells = layout.images[image].grid, layout.images[image].patches
    if layout.kind != "newline" or lies.shape != cells.shape[:2]:
        return 0, 0, *cells.shape[:2]
    real = (lies >= 0).nonzero()
    (top, left), (bottom, right) = real.min(dim=0).values.tolist(), real.max(dim=0).values.tolist()
    return top, left, bottom - top + 1, right - left + 1


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "florence2"])
@settings(max_examples=4)
@given(data=st.data())
def test_a_bright_spot_of_the_picture_lies_where_the_grid_says(family: str, data: st.DataObject) -> None:
    """A spot of the size of one patch, anywhere in a picture of any shape: the patch that changes most is its cell."""
    width, height = data.draw(st.sampled_from(FITTING.get(family, SHAPES)))
    if family == "llava_onevision" and (width, height) == (64, 48):
        return  # shrunk in the sequence, so that the border can't be told from there
    grey = np.full((height, width, 3), 100, dtype=np.uint8)
    batch = batch_of(family, [[picture(32, 32)], [Image.fromarray(grey)]])
    top, left, rows, cols = whole_cells(batch.layout, 1)
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    spot = grey.copy()
    spot[row * height // rows : (row + 1) * height // rows, col * width // cols : (col + 1) * width // cols] = 255
    other = batch_of(family, [[picture(32, 32)], [Image.fromarray(spot)]])
    dark, bright = (run(family, of).grid("vision.hook_embed", 1)[0] for of in (batch, other))
    change = (bright - dark).norm(dim=-1)
    assert divmod(int(change.argmax()), change.shape[1]) == (top + row, left + col)


SHAPES = [(32, 32), (64, 32), (32, 64), (48, 16), (96, 32), (64, 48)]


def pixels_of(family: str, batch: Batch, cell: torch.Tensor) -> torch.Tensor:
    """`pixel_values` with one patch (tower row, patch) made bright."""
    pixels = batch.inputs["pixel_values"].clone()
    row, patch = cell.tolist()
    if batch.layout.kind == "packed":
        pixels[batch.layout.tower_order[patch]] = 3.0
        return pixels
    size = tiny(family).config.vision_config.patch_size
    size = size if isinstance(size, int) else size[0]
    if pixels.ndim == 5:
        real = (pixels != 0).flatten(2).any(dim=2).nonzero()
        if batch.layout.kind == "newline":
            crops = torch.bincount(batch.layout.tower_image)
            real = torch.tensor([(image, crop) for image, n in enumerate(crops.tolist()) for crop in range(n)])
        shown = pixels[tuple(real[row].tolist())]
    else:
        shown = pixels[row]
    y, x = divmod(patch, shown.shape[-1] // size)
    shown[:, y * size : (y + 1) * size, x * size : (x + 1) * size] = 3.0
    return pixels


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in ("florence2", "mllama", "idefics2", "blip-2")]
)
@settings(max_examples=4)
@given(data=st.data())
def test_a_patch_reaches_the_position_the_grid_says(family: str, data: st.DataObject) -> None:
    """With a tower that leaves everything in place, one patch changes one position: the cell of both grids."""
    sizes = [[data.draw(st.sampled_from(SHAPES))], [data.draw(st.sampled_from(SHAPES))]]
    batch = made(family, sizes, data.draw(st.sampled_from(["left", "right"])))
    image = data.draw(st.integers(0, 1))
    overview = data.draw(st.booleans()) and batch.layout.images[image].overview is not None
    lies = batch.layout.images[image]
    patches, tokens = (lies.patches_overview, lies.overview) if overview else (lies.patches, lies.grid)
    if batch.layout.kind == "newline" and patches.shape[:2] != tokens.shape:
        return  # OneVision has shrunk this grid
    ratio = patches.shape[0] // tokens.shape[0]
    row, col = data.draw(st.integers(0, patches.shape[0] - 1)), data.draw(st.integers(0, patches.shape[1] - 1))
    model = position_wise(family)
    before = run(family, batch, model)
    batch.inputs["pixel_values"] = pixels_of(family, batch, patches[row, col])
    after = run(family, batch, model)
    moved = (before["hook_embed"] != after["hook_embed"]).any(dim=-1)
    position = int(tokens[row // ratio, col // ratio])
    expected = torch.zeros_like(moved)
    if position >= 0:
        expected[image, position] = True
    assert torch.equal(moved, expected)


@settings(max_examples=6)
@given(row=st.integers(0, 7), col=st.integers(0, 7))
def test_a_grid_that_onevision_shrinks_still_shows_the_picture(row: int, col: int) -> None:
    """8 x 8 patches become 5 x 5 positions: the one that changes most lies where the patch was."""
    batch = made("llava_onevision", [[(32, 32)]], "left")
    lies = batch.layout.images[0]
    assert lies.grid.shape == (5, 5)
    model = position_wise("llava_onevision")
    before = run("llava_onevision", batch, model).grid("hook_embed", 0)[0]
    batch.inputs["pixel_values"] = pixels_of("llava_onevision", batch, lies.patches[row, col])
    after = run("llava_onevision", batch, model).grid("hook_embed", 0)[0]
    most = divmod(int((after - before).norm(dim=-1).argmax()), 5)
    assert max(abs((most[0] + 0.5) / 5 - (row + 0.5) / 8), abs((most[1] + 0.5) / 5 - (col + 0.5) / 8)) <= 0.15


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("mllama", "idefics2", "blip-2", "florence2")])
@settings(max_examples=3)
@given(data=st.data())
def test_the_projectors_grid_is_the_sequences_grid(family: str, data: st.DataObject) -> None:
    """What the projector makes stands, cell by cell, in the sequence."""
    sizes = [[data.draw(st.sampled_from(SHAPES))] for _ in range(2)]
    batch = made(family, sizes, "left")
    cache = run(family, batch)
    for sample in range(2):
        for overview in (False, True):
            if overview and batch.layout.images[sample].overview is None:
                with pytest.raises(BadInputError, match=f"image {sample} has no overview of sequence: "):
                    cache.grid("hook_embed", sample, overview=True)
                continue
            (made_of,), (stands,) = (
                cache.grid(name, sample, overview=overview) for name in ("projector.hook_out", "hook_embed")
            )
            if made_of.shape != stands.shape:
                continue  # OneVision has shrunk this grid
            there = ~stands.isnan().any(dim=-1)
            assert there.any()
            torch.testing.assert_close(made_of[there], stands[there], atol=1e-6, rtol=0)


def test_windows_of_qwen2_5_are_sorted_back() -> None:
    """Its blocks see the patches by window; the pack's order and the grids undo it. Without windows nothing moves."""
    batch = made("qwen2_5_vl", [[(60, 44)], [(30, 60)]], "left")
    order = batch.layout.tower_order
    assert not torch.equal(order, torch.arange(len(order)))
    model = tiny("qwen2_5_vl")
    embedded = model.model.visual.patch_embed(batch.inputs["pixel_values"])
    seen = run("qwen2_5_vl", batch)["vision.hook_embed"]
    assert torch.equal(seen, embedded[order])
    plain = made("qwen2_vl", [[(60, 44)], [(30, 60)]], "left")
    assert torch.equal(plain.layout.tower_order, torch.arange(len(plain.layout.tower_order)))


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("idefics2", "hook_embed", "latent queries, which belong to no place"),
        ("idefics2", "projector.hook_out", "latent queries"),
        ("blip-2", "hook_embed", "latent queries"),
        ("blip-2", "projector.hook_in", "latent queries"),
        ("mllama", "hook_embed", "by cross-attention"),
        ("florence2", "projector.hook_in", "a row of stages"),
    ],
)
def test_grids_that_do_not_exist_are_refused_with_the_reason(family: str, name: str, reason: str) -> None:
    """Where positions have no order in space there is no grid."""
    cache = run(family, made(family, [[(32, 32)]], "left"))
    with pytest.raises(BadInputError, match=reason):
        cache.grid(name, 0)


def test_padding_of_the_tower_belongs_to_no_image() -> None:
    """Idefics2 fills pictures up to the largest, Mllama images up to four tiles: neither is selected."""
    batch = made("idefics2", [[(40, 24), (24, 24)]], "left")
    shown = batch.layout.owners(2, 15)
    assert (shown >= 0).sum(dim=1).tolist() == [15, 9]
    batch = made("mllama", [[(16, 32)], []], "left")
    width = run("mllama", batch)["vision.hook_embed"].shape[1]
    shown = batch.layout.owners(2, width)
    # Two tiles of sixteen patches, a class token each; the second sample has no image.
    assert (shown >= 0).sum(dim=1).tolist() == [34, 0]


def test_raw_tensors_of_internvl_do_not_tell_the_arrangement() -> None:
    """Four crops may be 2 x 2 or 1 x 4: the grid is refused, the overview known; prepare knows both."""
    batch = made("internvl", [[(64, 64)]], "left")
    raw = batch_from_inputs(batch.inputs, structure("internvl"), tiny("internvl").config)
    assert batch.layout.images[0].grid.shape == (4, 4)
    assert torch.equal(raw.layout.images[0].overview, batch.layout.images[0].overview)
    cache = run("internvl", raw)
    with pytest.raises(BadInputError, match="image 0 has no grid of sequence: how this image's crops are arranged"):
        cache.grid("hook_embed", 0)


def pan_and_scan() -> Any:
    """Gemma 3's processor with pan-and-scan: long pictures are shown whole, then in crops."""
    made = copy.copy(processor("gemma3"))
    made.images_kwargs = {
        **made.images_kwargs,
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 8,
        "pan_and_scan_min_ratio_to_activate": 1.4,
    }
    return made


VARIANTS = [
    ("gemma3", pan_and_scan, (64, 32), (4, 8), True),
    ("gemma3", pan_and_scan, (16, 48), (12, 4), True),
    ("gemma3", pan_and_scan, (32, 32), (4, 4), False),
    ("idefics2", lambda: idefics2(split=True), (48, 32), (6, 6), True),
]


@pytest.mark.parametrize(("family", "make", "size", "shape", "overview"), VARIANTS)
@settings(max_examples=3)
@given(data=st.data())
def test_pictures_cut_on_request(
    family: str, make: Callable[[], Any], size: tuple[int, int], shape: tuple, overview: bool, data: st.DataObject
) -> None:
    """Crops that only the processor knows of: shapes, and a bright spot lies where the grid says, in both views."""
    variant = make()
    (width, height), (rows, cols) = size, shape
    grey = np.full((height, width, 3), 100, dtype=np.uint8)
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    spot = grey.copy()
    spot[row * height // rows : (row + 1) * height // rows, col * width // cols : (col + 1) * width // cols] = 255
    # Beside another image in the same sample, whose crops must be told apart.
    batches = [
        batch_of(family, [[picture(64, 32)], [Image.fromarray(of), picture(20, 20)]], variant=variant)
        for of in (grey, spot)
    ]
    assert batches[0].image_sample.tolist() == [0, 1, 1]
    dark, bright = (run(family, batch) for batch in batches)
    seen = [dark.grid("vision.hook_embed", 1), bright.grid("vision.hook_embed", 1)]
    change = (seen[1][0] - seen[0][0]).norm(dim=-1)
    assert change.shape == shape
    assert divmod(int(change.argmax()), cols) == (row, col)
    assert torch.equal(seen[0][1], seen[1][1])
    first, layout = batches[0].layout.images[1], batches[0].layout
    assert (first.patches_overview is not None) == overview
    if overview:
        small = [layout.read(1, cache["vision.hook_embed"], "patches", overview=True) for cache in (dark, bright)]
        most = divmod(int((small[1] - small[0]).norm(dim=-1).argmax()), small[0].shape[1])
        there = ((row + 0.5) / rows * small[0].shape[0], (col + 0.5) / cols * small[0].shape[1])
        assert max(abs(most[axis] + 0.5 - there[axis]) for axis in (0, 1)) <= 1
    moved = (dark["hook_embed"] != bright["hook_embed"]).any(dim=-1)
    assert moved.any()
    assert not (moved & (batches[0].image_index != 1)).any()


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "idefics3"])
def test_cut_off_texts_are_refused_with_the_sample(family: str) -> None:
    """One image position less than the images take."""
    batch = made(family, [[(32, 32)], [(32, 32)]], "left")
    inputs = dict(batch.inputs)
    ids = inputs["input_ids"].clone()
    ids[1, batch.image_index[1].argmax()] = 1
    with pytest.raises(BadInputError, match="image positions"):
        batch_from_inputs({**inputs, "input_ids": ids}, structure(family), tiny(family).config)


def test_points_cover_tower_projector_and_text() -> None:
    """The helper's own places exist in every model."""
    for family in FAMILIES:
        for point in points(family).values():
            tiny(family).get_submodule(point.module)
