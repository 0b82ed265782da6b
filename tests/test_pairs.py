"""Contrast pairs: one difference and no other, to the pixel; one question, two answers, both true."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hooked_mm.errors import BadInputError
from hooked_mm.scenes.draw import mask, render
from hooked_mm.scenes.pairs import ATTRIBUTES, ScenePair, changes, scene_pair
from hooked_mm.scenes.world import SPLITS, Scene, SceneObject, reading_order, split_of
from tests.test_questions import truth

PAIRS = {
    (split, attribute): [scene_pair(split, index, attribute) for index in range(8)]
    for split in SPLITS
    for attribute in ATTRIBUTES
}
ALL = [pair for pairs in PAIRS.values() for pair in pairs]


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_same_numbers_same_pair(attribute: str) -> None:
    """A pair depends on its numbers alone; another index or seed gives another."""
    first = PAIRS["train", attribute][3]
    assert scene_pair("train", 3, attribute) == first
    assert scene_pair("train", 4, attribute) != first
    assert scene_pair("train", 3, attribute, seed=1) != first


def test_both_answers_are_true() -> None:
    """Read anew from each scene, the answers are right, and their first words differ."""
    for pair in ALL:
        assert pair.answers == (truth(pair.one, pair.question), truth(pair.other, pair.question))
        assert pair.answers[0].split()[0] != pair.answers[1].split()[0]


def test_nothing_else_differs() -> None:
    """Canvas and texture are the same; so is every object but the changed one, and that but for the attribute."""
    for pair in ALL:
        assert replace(pair.one, objects=(), place="") == replace(pair.other, objects=(), place="")
        assert (pair.one.place != pair.other.place) == (pair.attribute == "place")
        gone, come = set(pair.one.objects) - set(pair.other.objects), set(pair.other.objects) - set(pair.one.objects)
        assert (next(iter(gone), None), next(iter(come), None)) == pair.items
        assert (len(gone), len(come)) == {"place": (0, 0), "count": (1, 0)}.get(pair.attribute, (1, 1))
        assert pair.other.objects == reading_order(pair.other.objects)
        if come:
            fields = {"colour": ["colour"], "shape": ["shape"], "size": ["size", "radius"], "position": ["x", "y"]}
            one, other = pair.items
            kept = {name: getattr(one, name) for name in fields[pair.attribute]}
            assert replace(other, **kept) == one


def test_pictures_differ_where_the_object_is() -> None:
    """Outside the changed object's two masks no pixel differs; where the place changes, only the objects stay."""
    for pair in ALL:
        (first, masks), (second, _) = render(pair.one), render(pair.other)
        differs = (first != second).any(-1)
        assert differs.any()
        if pair.attribute == "place":
            assert not differs[(masks == 1).any(0)].any()
            assert differs[(masks == 0).all(0)].mean() > 0.9
        else:
            width, height = pair.one.width, pair.one.height
            touched = sum(mask(item, width, height) for item in pair.items if item is not None)
            assert not differs[touched == 0].any()


@pytest.mark.parametrize("split", SPLITS[:3])
def test_both_scenes_belong_to_the_split(split: str) -> None:
    """Neither is of another split."""
    pairs = [pair for attribute in ATTRIBUTES for pair in PAIRS[split, attribute]]
    assert {split_of(item) for pair in pairs for item in (pair.one, pair.other)} == {split}


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_unseen_pairs_are_about_the_held_out_object(attribute: str) -> None:
    """The first shows a held-out pair, the second too unless that is what changes; this object is asked about."""
    for pair in PAIRS["unseen", attribute]:
        assert pair.one.held_out
        assert pair.other.held_out == (attribute not in ("colour", "shape"))
        item, _ = pair.items
        assert item is None or item.held_out == (attribute != "count")


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_count_is_kept_to(attribute: str) -> None:
    """The first scene has as many objects as asked for; for `count` the second has one fewer."""
    for count in (2, 3):
        pair = scene_pair("train", 0, attribute, count=count)
        assert len(pair.one.objects) == count
        assert len(pair.other.objects) == count - (attribute == "count")


RING = SceneObject("ring", "blue", "big", 0.28, 0.3, 0.2)
STAR = SceneObject("star", "red", "small", 0.7, 0.7, 0.13)
WORLD = Scene("sea", (RING, STAR), 5)


def test_changes_of_a_scene_by_hand() -> None:
    """All other values and no held-out pair; places of the other half; one object fewer."""
    rng = np.random.default_rng(0)
    colours = [item.objects[0].colour for item in changes(WORLD, "colour", 0, rng)]
    assert sorted(colours) == ["black", "orange", "purple", "red", "white", "yellow"]  # a green ring is held out
    assert len(list(changes(WORLD, "shape", 1, rng))) == 5
    assert [item.objects[1].size for item in changes(WORLD, "size", 1, rng)] == ["big"]
    assert {
        item.position for new in changes(WORLD, "position", 1, rng) for item in new.objects if item.shape == "star"
    } <= {
        "top left",
        "top right",
    }
    assert len(set(changes(WORLD, "place", 0, rng))) == 5
    assert [item.objects for item in changes(WORLD, "count", 0, rng)] == [(STAR,)]


def test_where_nothing_fits_there_is_no_change() -> None:
    """A small object at the border cannot be big; an only object cannot be taken away."""
    cornered = replace(STAR, x=0.84, y=0.84)
    rng = np.random.default_rng(0)
    assert not list(changes(Scene("sea", (cornered,), 5), "size", 0, rng))
    assert not list(changes(Scene("sea", (cornered,), 5), "count", 0, rng))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("trian", 0, "colour"), "trian"),
        (("train", 0, "color"), "color"),
        (("train", 0, "colour", 0, 4), "count=4"),
        (("train", 0, "count", 0, 1), "count=1"),
        (("train", -1, "colour"), "index=-1"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: tuple, named: str) -> None:
    """The error names the value."""
    with pytest.raises(BadInputError, match=named):
        scene_pair(*arguments[:4], **({"count": arguments[4]} if len(arguments) > 4 else {}))
    with pytest.raises(BadInputError, match="no object 2"):
        next(changes(WORLD, "colour", 2, np.random.default_rng(0)))


def test_a_pair_is_a_value() -> None:
    """Frozen and comparable."""
    pair = ALL[0]
    assert isinstance(pair, ScenePair)
    assert replace(pair) == pair
