"""Scenes as data: reproducible one by one, and always what the docstrings promise."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.scenes.world import (
    COLOURS,
    COUNTS,
    JITTER,
    PLACES,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    all_facts,
    sample_scene,
    scene,
)

SEEDS = st.integers(0, 5000)
INDICES = st.integers(0, 100_000)


@given(SEEDS, INDICES)
def test_same_numbers_same_scene(seed: int, index: int) -> None:
    """A scene depends on its seed and index alone, not on what was made before it."""
    first = scene(seed, index)
    scene(seed + 1, index)
    scene(seed, index + 1)
    assert scene(seed, index) == first


def test_a_known_scene() -> None:
    """Scene (3000, 0) is the same on every machine and in every version: shipped models were trained on this stream."""
    item = scene(3000, 0)
    assert (item.place, item.texture_seed) == ("beach", 1611736944)
    assert [(o.shape, o.colour, o.size, o.position) for o in item.objects] == [
        ("triangle", "blue", "small", "top left"),
        ("cross", "white", "big", "bottom left"),
    ]


@given(SEEDS, INDICES)
def test_objects_of_a_scene_never_share_an_attribute_that_names_them(seed: int, index: int) -> None:
    """Two objects differ in shape, colour and position; every value is a known word; all fits on the canvas."""
    item = scene(seed, index)
    assert 1 <= len(item.objects) <= 2
    assert item.place in PLACES
    for name, words in (("shape", SHAPES), ("colour", COLOURS), ("position", POSITIONS)):
        values = [getattr(o, name) for o in item.objects]
        assert len(set(values)) == len(values)
        assert set(values) <= set(words)
    for o in item.objects:
        assert o.radius < min(o.x, 1 - o.x) + 0.02
        assert o.radius < min(o.y, 1 - o.y) + 0.02


@given(SEEDS, INDICES)
def test_position_and_size_follow_from_the_geometry(seed: int, index: int) -> None:
    """The position word is the quadrant of the centre; a big object is larger than any small one; jitter is bounded."""
    for o in scene(seed, index).objects:
        assert o.position == f"{'top' if o.y < 0.5 else 'bottom'} {'left' if o.x < 0.5 else 'right'}"
        assert max(abs(abs(o.x - 0.5) - 0.23), abs(abs(o.y - 0.5) - 0.23)) <= JITTER + 1e-9
        assert (o.radius > 0.15) == (o.size == "big")


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_position_word_of_any_point(x: float, y: float) -> None:
    """Wherever an object stands, the word is that of its quadrant (lines between quadrants aside)."""
    if abs(x - 0.5) > 1e-6 and abs(y - 0.5) > 1e-6:
        item = SceneObject("circle", "red", "big", x, y, 0.1)
        assert item.position == f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"


@given(SEEDS, INDICES)
def test_objects_stand_in_reading_order(seed: int, index: int) -> None:
    """Top to bottom, then left to right."""
    centres = [(o.y > 0.5, o.x > 0.5) for o in scene(seed, index).objects]
    assert centres == sorted(centres)


@pytest.mark.parametrize(("share", "counts"), [(0.0, {1}), (1.0, {2})])
def test_share_of_two_objects_at_its_ends(share: float, counts: set[int]) -> None:
    """With share 0 no scene has two objects, with share 1 every scene has."""
    assert {len(scene(5, index, two_objects=share).objects) for index in range(60)} == counts


def test_every_value_occurs_as_often_as_it_should() -> None:
    """Over 2,000 scenes every word of a class is near its fair share, and two objects near 70 %."""
    rng = np.random.default_rng(11)
    items = [sample_scene(rng) for _ in range(2000)]
    objects = [o for item in items for o in item.objects]
    assert np.mean([len(item.objects) == 2 for item in items]) == pytest.approx(0.7, abs=0.05)
    for name, words in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("position", POSITIONS)):
        shares = {word: count / len(objects) for word, count in Counter(getattr(o, name) for o in objects).items()}
        assert set(shares) == set(words)
        assert all(share == pytest.approx(1 / len(words), abs=0.04) for share in shares.values())
    assert Counter(item.place for item in items).keys() == set(PLACES)


def test_facts_of_a_scene_written_by_hand() -> None:
    """Facts name place, count and the attributes of every object, and nothing else."""
    ring = SceneObject("ring", "blue", "big", 0.25, 0.3, 0.19)
    star = SceneObject("star", "red", "big", 0.7, 0.7, 0.19)
    assert Scene("sea", (ring, star), 0).facts() == {
        "place=sea",
        "count=two",
        "shape=ring",
        "shape=star",
        "colour=blue",
        "colour=red",
        "size=big",
        "position=top left",
        "position=bottom right",
    }
    assert "count=one" in Scene("sea", (ring,), 0).facts()


def test_all_facts_are_those_that_occur() -> None:
    """Every listed fact is true of some scene, every true fact is listed, once."""
    listed = all_facts()
    seen = frozenset().union(*(scene(17, index).facts() for index in range(400)))
    assert len(set(listed)) == len(listed)
    assert seen == set(listed)
    assert len(listed) == sum(map(len, (SHAPES, COLOURS, SIZES, POSITIONS, PLACES, COUNTS)))
