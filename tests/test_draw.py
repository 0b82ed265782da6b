"""Pictures: the same bytes for the same scene, and masks that say truly which pixels an object covers."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.scenes.draw import OUTLINES, PLACE_PAINT, background, mask, render
from hooked_mm.scenes.world import COLOURS, PLACES, SHAPES, SPLITS, Scene, SceneObject, scene

SCENES = st.builds(scene, st.sampled_from(SPLITS), st.integers(0, 5000), st.integers(0, 5000))


def test_known_bytes() -> None:
    """The first three scenes of every split have the pixels and masks that the shipped models were trained on."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(3):
            for array in render(scene(split, index)):
                digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == "1917e4589c3239c5"


@given(SCENES)
def test_rendering_twice_gives_the_same_picture(item: Scene) -> None:
    """Nothing but the scene enters the picture."""
    first, masks = render(item)
    again, masks_again = render(item)
    assert first.dtype == np.uint8
    assert first.shape == (item.height, item.width, 3)
    assert (first == again).all()
    assert (masks == masks_again).all()


@given(SCENES)
def test_masks_are_where_the_picture_differs_from_its_background(item: Scene) -> None:
    """Covered pixels have the object's colour, untouched pixels the background's, mixed ones lie in between."""
    picture, masks = render(item)
    empty = background(item).round().clip(0, 255)
    assert masks.min() >= 0
    assert masks.max() == 1
    untouched = (masks == 0).all(0)
    assert (picture[untouched] == empty[untouched]).all()
    assert 0 < untouched.mean() < 1
    for o, cover in zip(item.objects, masks, strict=True):
        alone = masks.sum(0) == cover  # the corners of two squares or triangles may touch
        full = (cover == 1) & alone
        assert full.sum() > 8
        assert (picture[full] == np.asarray(COLOURS[o.colour])).all()
        edge = (cover > 0) & (cover < 1) & alone
        share = cover[edge][:, None]
        mixed = background(item)[edge] * (1 - share) + np.asarray(COLOURS[o.colour]) * share
        assert np.abs(picture[edge] - mixed.clip(0, 255)).max(initial=0) <= 0.5 + 1e-6
    # Where half of a pixel is covered, it looks unlike the background.
    covered = (masks >= 0.5).any(0)
    assert (np.abs(picture[covered] - empty[covered]).max(-1) >= 8).all()


def test_objects_hardly_ever_touch() -> None:
    """Distances keep circles apart, but corners reach further: in 400 scenes at most a few share the rim of a pixel."""
    cover = [render(scene(split, index))[1] for split in ("train", "unseen") for index in range(200)]
    assert all(((masks > 0.5).sum(0) <= 1).all() for masks in cover)
    assert sum(((masks > 0).sum(0) > 1).any() for masks in cover) <= 6


AREAS = {
    "circle": np.pi,
    "square": (2 * 0.88) ** 2,
    "triangle": 3 * np.sqrt(3) / 4 * 1.15**2,
    "star": 10 * 0.5 * 1.1 * 0.45 * np.sin(np.pi / 5),
    "cross": 2 * (2 * 0.6) - 0.36,
    "ring": np.pi * (1 - 0.3),
}
"""Closed-form areas at radius 1. The star is ten triangles of sides 1.1 and .45 with the angle pi / 5 between them."""


@pytest.mark.parametrize("shape", SHAPES)
def test_area_of_every_shape(shape: str) -> None:
    """What a mask sums to is the area that school geometry gives, on a canvas large enough to hide the pixels."""
    item = SceneObject(shape, "red", "big", 0.5, 0.5, 0.3)
    radius = 0.3 * 200
    assert mask(item, 200, 200).sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_is_centred_where_the_object_is(shape: str) -> None:
    """Left-right symmetric shapes have their centre of mass at x; moving the object moves the mask with it."""
    width, height = 96, 64
    cover = mask(SceneObject(shape, "red", "big", 0.25, 0.5, 0.2), width, height)
    columns = np.arange(width) + 0.5
    assert (cover.sum(0) * columns).sum() / cover.sum() == pytest.approx(0.25 * width, abs=0.2)
    moved = mask(SceneObject(shape, "red", "big", 0.5, 0.5, 0.2), width, height)
    assert np.array_equal(np.roll(cover, width // 4, axis=1), moved)


@given(st.sampled_from(SHAPES), st.floats(-0.1, 1.1), st.floats(-0.1, 1.1), st.floats(0.05, 0.5))
def test_objects_may_be_cut_off_by_the_border(shape: str, x: float, y: float, radius: float) -> None:
    """Part of an object outside the canvas is cut off; the part inside is what a larger canvas shows there."""
    cover = mask(SceneObject(shape, "red", "big", x, y, radius), 32, 32)
    # The same object on a canvas three times as wide, whose middle is the first one.
    wide = mask(SceneObject(shape, "red", "big", (x + 1) / 3, (y + 1) / 3, radius / 3), 96, 96)
    assert np.abs(cover - wide[32:64, 32:64]).mean() < 0.01


@pytest.mark.parametrize("place", PLACES)
def test_every_place_has_its_own_look(place: str) -> None:
    """A place's mean colour is nearer to its own base than to any other place's, and its texture is not flat."""
    one = SceneObject("circle", "red", "big", 0.5, 0.5, 0.2)
    worlds = [Scene(place, (one,), seed) for seed in range(8)]
    mean = np.mean([background(world).mean((0, 1)) for world in worlds], axis=0)
    nearest = min(PLACE_PAINT, key=lambda name: float(np.linalg.norm(mean - np.asarray(PLACE_PAINT[name][0]))))
    assert nearest == place
    assert all(background(world).std((0, 1)).min() > 4 for world in worlds)
    assert not np.array_equal(background(worlds[0]), background(worlds[1]))


def test_other_canvas_sizes() -> None:
    """Width and height may differ; sizes are fractions of the shorter side."""
    item = replace(scene("test", 1), width=96, height=48)
    picture, masks = render(item)
    assert picture.shape == (48, 96, 3)
    square = render(replace(item, width=48))[1]
    assert masks.sum((1, 2)) == pytest.approx(square.sum((1, 2)), rel=0.05)


def test_every_shape_of_the_world_can_be_drawn() -> None:
    """Shapes and places that can be sampled are those that can be painted."""
    assert set(OUTLINES) == set(SHAPES)
    assert set(PLACE_PAINT) == set(PLACES)
