"""Scenes as data: reproducible one by one, always what the docstrings promise, and nothing held out leaks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from hooked_mm.scenes.world import (
    CANVASES,
    COLOURS,
    COUNT_SHARES,
    COUNTS,
    HELD_OUT,
    HELD_OUT_SHAPE,
    PLACES,
    POSITIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    SceneObject,
    _fitting,
    all_facts,
    clear,
    reading_order,
    relations,
    sample_scene,
    scene,
    split_of,
)

SEEDS = st.integers(0, 5000)
INDICES = st.integers(0, 100_000)
MANY = {split: [scene(split, index) for index in range(150)] for split in SPLITS}
ALL = [item for items in MANY.values() for item in items]


@given(st.sampled_from(SPLITS), SEEDS, INDICES)
def test_same_numbers_same_scene(split: str, seed: int, index: int) -> None:
    """A scene depends on its split, seed and index alone, not on what was made before it."""
    first = scene(split, index, seed)
    assert scene(split, index + 1, seed) != first
    assert scene(split, index, seed + 1) != first
    assert scene(split, index, seed) == first


def test_a_known_scene() -> None:
    """Scene 0 of the training split is the same on every machine: shipped models were trained on this stream."""
    item = scene("train", 0)
    assert (item.place, item.texture_seed, item.width, item.height) == ("city", 1640303286, 56, 56)
    assert [(o.shape, o.colour, o.size, o.position) for o in item.objects] == [
        ("square", "green", "big", "top right"),
        ("triangle", "purple", "big", "bottom left"),
    ]
    numbers = [(o.x, o.y, o.radius) for o in item.objects]
    assert np.allclose(numbers, [(0.606569, 0.31751, 0.212866), (0.420914, 0.761048, 0.203017)], atol=1e-6)


def reach(item: SceneObject, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of an object's outline in pixels, by school geometry (radius 1, y down)."""
    r = item.radius * min(width, height)
    up, down, aside = {
        "circle": (1, 1, 1),
        "ring": (1, 1, 1),
        "cross": (1, 1, 1),
        "square": (0.88, 0.88, 0.88),
        "triangle": (1.15 - 0.2, 1.15 / 2 + 0.2, 1.15 * np.sqrt(3) / 2),
        "star": (1.1, 1.1 * np.cos(np.pi / 5), 1.1 * np.cos(np.pi / 10)),
    }[item.shape]
    x, y = item.x * width, item.y * height
    return x - aside * r, y - up * r, x + aside * r, y + down * r


def test_objects_lie_inside_and_apart_and_their_words_are_beyond_doubt() -> None:
    """Over 600 scenes of all splits: outlines on the canvas, centres off the midlines, apart, and sizes with a gap."""
    for item in ALL:
        width, height = item.width, item.height
        assert (width, height) in CANVASES
        for o in item.objects:
            left, top, right, bottom = reach(o, width, height)
            assert min(left, top) >= 0
            assert right <= width
            assert bottom <= height
            assert abs(o.x - 0.5) >= 0.05
            assert abs(o.y - 0.5) >= 0.05
            assert (0.19 <= o.radius <= 0.22) if o.size == "big" else (0.12 <= o.radius <= 0.14)
        for one, other in combinations(item.objects, 2):
            distance = np.hypot((one.x - other.x) * width, (one.y - other.y) * height)
            assert distance >= 1.1 * (one.radius + other.radius) * min(width, height) - 1e-9
            if (one.y < 0.5) == (other.y < 0.5):
                assert abs(one.x - other.x) >= 0.08


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_position_word_of_any_point(x: float, y: float) -> None:
    """The word is that of the quarter in which the centre lies."""
    word = SceneObject("circle", "red", "big", x, y, 0.1).position
    assert word in POSITIONS
    assert word.startswith("top") == (y < 0.5)
    assert word.endswith("left") == (x < 0.5)


@pytest.mark.parametrize(
    ("centres", "radii", "fine"),
    [
        ([(0.3, 0.3)], [0.2], True),
        ([(0.2, 0.3)], [0.2], False),  # reaches out of the canvas on the left
        ([(0.3, 0.8)], [0.2], False),  # and at the bottom
        ([(0.46, 0.3)], [0.2], False),  # left or right?
        ([(0.3, 0.54)], [0.2], False),  # top or bottom?
        ([(0.3, 0.3), (0.7, 0.3)], [0.13, 0.13], True),
        ([(0.25, 0.25), (0.44, 0.44)], [0.13, 0.13], False),  # too near
        ([(0.25, 0.25), (0.445, 0.445)], [0.12, 0.12], True),
        ([(0.25, 0.2), (0.3, 0.44)], [0.1, 0.1], False),  # which of the two comes first?
        ([(0.25, 0.2), (0.3, 0.8)], [0.1, 0.1], True),  # in different halves that is no question
    ],
)
def test_which_objects_are_clear_by_hand(centres: list, radii: list, fine: bool) -> None:
    """Cases on a square canvas, one rule each, whichever object comes first, and among other tries."""
    tries = np.array([centres, centres[::-1], [(0.5, 0.5)] * len(centres)])
    assert clear(tries[:1], np.array(radii), 50, 50).tolist() == [fine]
    assert clear(tries, np.array(radii), 50, 50).tolist() == [fine, fine, False]


def test_widths_and_radii_are_of_different_units() -> None:
    """On a wide canvas the same radius is a smaller share of the width: what is outside on a square is inside."""
    centre, radius = np.array([[(0.2, 0.3)]]), np.array([0.2])
    assert not clear(centre, radius, 48, 48)[0]
    assert clear(centre, radius, 72, 48)[0]
    assert not clear(centre[..., ::-1], radius, 72, 48)[0]


@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0.12, 0.2), st.sampled_from(CANVASES))
def test_crowded_scenes_are_those_of_the_plain_search(seed: int, number: int, radius: float, canvas: tuple) -> None:
    """However many tries are made at once, centres and the generator's state are those of blocks of 128."""
    fast, plain = np.random.default_rng(seed), np.random.default_rng(seed)
    assert fast.integers(7) == plain.integers(7)
    radii = np.full(number, radius)
    tries = plain.random((128, number, 2))
    while not (fine := clear(tries, radii, *canvas)).any():
        tries = plain.random((128, number, 2))
    assert np.array_equal(_fitting(fast, radii, *canvas), tries[fine.argmax()])
    assert fast.bit_generator.state == plain.bit_generator.state


def test_reading_order_by_hand() -> None:
    """The top half first, each from left to right, whatever the heights within a half."""

    def at(x: float, y: float) -> SceneObject:
        return SceneObject("star", "red", "small", x, y, 0.12)

    assert reading_order([at(0.2, 0.7), at(0.8, 0.2), at(0.3, 0.4)]) == (at(0.3, 0.4), at(0.8, 0.2), at(0.2, 0.7))
    assert all(item.objects == reading_order(item.objects[::-1]) for item in ALL)


@given(*[st.floats(0.1, 0.9)] * 4)
def test_relations_are_opposite_from_the_other_side(x: float, y: float, other_x: float, other_y: float) -> None:
    """What is left of another has it on its right; near to each other, nothing is said."""
    one = SceneObject("star", "red", "small", x, y, 0.12)
    other = SceneObject("ring", "blue", "small", other_x, other_y, 0.12)
    said = relations(one, other)
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    assert relations(other, one) == tuple(opposite[word] for word in said)
    assert ("left" in said) == (other_x - x >= 0.12)
    assert ("above" in said) == (other_y - y >= 0.12)
    assert len(said) == (abs(x - other_x) >= 0.12) + (abs(y - other_y) >= 0.12)


def test_no_description_is_in_two_splits() -> None:
    """Scenes described alike, whatever their canvas, texture and exact centres, are of one split."""
    told: dict[str, set[str]] = {split: {item.description() for item in items} for split, items in MANY.items()}
    for one, other in combinations(SPLITS, 2):
        assert not told[one] & told[other]
    # One object has few descriptions, so that many are met again: the rule is put to the test.
    singles = {split: [scene(split, index, count=1) for index in range(150)] for split in SPLITS[:3]}
    told = {split: {item.description() for item in items} for split, items in singles.items()}
    assert len(told["test"]) < 150
    for one, other in combinations(SPLITS[:3], 2):
        assert not told[one] & told[other]


@given(st.sampled_from(SPLITS), INDICES, st.integers(0, 2**31 - 1), st.sampled_from(CANVASES))
def test_the_split_is_a_matter_of_the_description(split: str, index: int, texture: int, canvas: tuple) -> None:
    """Another texture, canvas or jitter does not move a scene to another split."""
    item = scene(split, index)
    nudged = tuple(replace(o, x=o.x + 0.004 * np.sign(o.x - 0.5)) for o in item.objects)
    moved = Scene(item.place, nudged, texture, *canvas)
    assert moved.description() == item.description()
    assert split_of(item) == split_of(moved) == split


def test_shares_of_the_splits() -> None:
    """Of scenes without a held-out pair eight in ten are for training, one in ten each for validation and test."""
    rng = np.random.default_rng(3)
    drawn = Counter(split_of(sample_scene(rng, count=1 + number % 2)) for number in range(1500))
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        # 4 standard deviations.
        assert drawn[split] / 1500 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 1500))
    assert drawn["unseen"] == 0


def test_held_out_pairs_are_shown_in_unseen_alone() -> None:
    """Never in training, validation or test; once in every scene of `unseen`, each pair now and then."""
    held = set(HELD_OUT.items())
    shown = {split: [[(o.shape, o.colour) in held for o in item.objects] for item in MANY[split]] for split in SPLITS}
    assert not any(any(flags) for split in SPLITS[:3] for flags in shown[split])
    assert all(sum(flags) == 1 for flags in shown["unseen"])
    assert all(item.held_out == (split == "unseen") for split, items in MANY.items() for item in items)
    assert {(o.shape, o.colour) for item in MANY["unseen"] for o in item.objects if o.held_out} == held


def test_each_half_of_a_held_out_pair_is_known() -> None:
    """Every shape and every colour is in training, in other company; no shape or colour is held out twice."""
    seen = {(o.shape, o.colour) for item in MANY["train"] for o in item.objects}
    assert {shape for shape, _ in seen} == set(SHAPES)
    assert {colour for _, colour in seen} == set(COLOURS)
    assert len(set(HELD_OUT.values())) == len(HELD_OUT)
    assert {shape: colour for colour, shape in HELD_OUT_SHAPE.items()} == HELD_OUT


def test_shares_of_counts_canvases_and_words() -> None:
    """Over 600 scenes counts and canvases have the shares they should, and every word occurs."""
    number = len(ALL)

    def near(found: int, share: float, of: int) -> bool:
        return abs(found / of - share) <= 4 * np.sqrt(share * (1 - share) / of)

    counts = Counter(len(item.objects) for item in ALL)
    assert all(near(counts[n + 1], share, number) for n, share in enumerate(COUNT_SHARES))
    canvases = Counter((item.width, item.height) for item in ALL)
    assert all(near(canvases[canvas], 1 / len(CANVASES), number) for canvas in CANVASES)
    assert all(near(Counter(item.place for item in ALL)[place], 1 / len(PLACES), number) for place in PLACES)
    objects = [o for items in MANY.values() for item in items for o in item.objects]
    assert all(near(Counter(o.size for o in objects)[size], 1 / 2, len(objects)) for size in SIZES)
    assert all(near(Counter(o.position for o in objects)[word], 1 / 4, len(objects)) for word in POSITIONS)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_only_scenes_with_so_many_objects(count: int) -> None:
    """`count` is kept to, in every split."""
    assert {len(scene(split, index, count=count).objects) for split in SPLITS for index in range(6)} == {count}


@pytest.mark.parametrize(
    ("arguments", "named"), [(("tests", 0), "tests"), (("train", 0, 0), "count=0"), (("train", 0, 4), "count=4")]
)
def test_what_does_not_exist_is_refused(arguments: tuple, named: str) -> None:
    """The error names the value."""
    split, index, *count = arguments
    with pytest.raises(BadInputError, match=named):
        scene(split, index, **({"count": count[0]} if count else {}))


def test_facts_and_description_of_a_scene_written_by_hand() -> None:
    """Facts name place, count and every object's attributes, and nothing else; the description does so in order."""
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
    assert Scene("sea", (ring, star), 0).description() == "big blue ring top left; big red star bottom right; sea"
    assert "count=one" in Scene("sea", (ring,), 0).facts()


def test_all_facts_are_those_that_occur() -> None:
    """Every listed fact is true of some scene, every true fact is listed, once."""
    listed = all_facts()
    assert len(set(listed)) == len(listed) == sum(map(len, (SHAPES, COLOURS, SIZES, POSITIONS, PLACES, COUNTS)))
    assert frozenset().union(*(item.facts() for item in ALL)) == set(listed)
