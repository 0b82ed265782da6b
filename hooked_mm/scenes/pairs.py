"""Contrast pairs: two scenes that differ in one attribute of one object, in their place, or by one object.

For activation patching and causal tests: `one` is the clean run, `other` the corrupt one, or the other way round.
Everything else stays to the pixel: canvas, texture, the other objects, where the object is. Both are asked the same
question, word for word, so that every position of one prompt has its partner in the other, and the right answers differ
in their first word, so that one difference of two logits at the last position of the prompt tells them apart.

| attribute | what changes | question | answers |
|---|---|---|---|
| `colour` | the object's colour | what colour is the star ? | red, blue |
| `shape` | its outline | what shape is the red object ? | star, ring |
| `size` | its radius | is the star big or small ? | big, small |
| `position` | where it is: it moves between the top and the bottom half | where is the star ? | top left, bottom left |
| `place` | the background | what place is this ? | sea, snow |
| `count` | the object is taken away | how many objects are there ? | three, two |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from hooked_mm.errors import BadInputError, unknown
from hooked_mm.scenes.questions import ASKED, ASKED_OF_SCENE, references
from hooked_mm.scenes.world import (
    COLOURS,
    COUNTS,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    SceneObject,
    clear,
    reading_order,
    sample_scene,
    split_of,
)

ATTRIBUTES = {
    "colour": "colour",
    "shape": "shape",
    "size": "size",
    "position": "where",
    "place": "place",
    "count": "count",
}
"""What two scenes can differ in, and the type of question that asks for it."""

TRIES = 16
"""How many radii, and sixteen times as many centres, are tried before a change is taken for one that does not fit."""


@dataclass(frozen=True)
class ScenePair:
    """Two scenes, what differs, and a question with the answer in each.

    Attributes:
        one: The first scene, of the split asked for.
        other: The same but for `attribute`.
        attribute: One of `ATTRIBUTES`.
        index: The number of the changed object in `one.objects`; None where the place changes.
        question: Asked of both; it names the changed object alone in both, without giving the attribute away.
        answers: The right answer for `one` and for `other`; their first words differ.
    """

    one: Scene
    other: Scene
    attribute: str
    index: int | None
    question: str
    answers: tuple[str, str]

    @property
    def items(self) -> tuple[SceneObject | None, SceneObject | None]:
        """The changed object as it is in `one` and in `other`; None where there is none (place; the one taken away)."""
        first = None if self.index is None else self.one.objects[self.index]
        return first, next((item for item in self.other.objects if item not in self.one.objects), None)


def changes(scene: Scene, attribute: str, index: int, rng: np.random.Generator) -> Iterator[Scene]:
    """The scene with every other value of one attribute of object `index`, in random order, where it fits.

    A changed size keeps the centre, a changed position everything else. No held-out pair of shape and colour comes up.
    `count` takes the object away, unless it is the only one; for `place` the index is of no account.

    Raises:
        BadInputError: For an unknown attribute, or an object that the scene does not have.
    """
    _check("attribute", attribute, ATTRIBUTES)
    if not 0 <= index < len(scene.objects):
        raise BadInputError(f"no object {index} in a scene of {len(scene.objects)}; they are counted from 0")
    rest = scene.objects[:index] + scene.objects[index + 1 :]
    if attribute == "place":
        for place in _others(PLACES, scene.place, rng):
            yield replace(scene, place=place)
    elif attribute == "count":
        if rest:
            yield replace(scene, objects=rest)
    else:
        for item in _variants(scene.objects[index], rest, attribute, scene, rng):
            yield replace(scene, objects=reading_order([*rest, item]))


def scene_pair(split: str, index: int, attribute: str, seed: int = 0, *, count: int | None = None) -> ScenePair:
    """Pair number `index` of a split for an attribute: any pair can be made without making those before it.

    Both scenes belong to the split. In `unseen` it is the object with the held-out pair of shape and colour that
    changes (for `count` another one is taken away), so that where its shape or colour changes, `other` is a scene of
    another split.

    Args:
        split: One of `SPLITS`.
        index: From 0 on.
        attribute: One of `ATTRIBUTES`.
        seed: Another seed gives other pairs of the same split.
        count: Only scenes `one` with this many objects.

    Raises:
        BadInputError: For an unknown split or attribute, a count that such scenes do not have, a negative number.
    """
    _check("split", split, SPLITS)
    _check("attribute", attribute, ATTRIBUTES)
    fewest = 2 if attribute == "count" else 1
    if count is not None and not fewest <= count <= len(COUNTS):
        raise BadInputError(f"count={count}: pairs for {attribute!r} have {fewest} to {len(COUNTS)} objects")
    if index < 0 or seed < 0:
        raise BadInputError(f"index={index}, seed={seed}: neither can be negative")
    rng = np.random.default_rng([SPLITS.index(split), seed, index, 2, list(ATTRIBUTES).index(attribute)])
    while True:
        drawn = sample_scene(rng, unseen=split == "unseen", count=count)
        # A pair needs two descriptions of a split that may hold a tenth of them: trying other places is cheap.
        choices = list(product(PLACES, _numbers(drawn, attribute)))
        for choice in rng.permutation(len(choices)):
            place, number = choices[choice]
            one = replace(drawn, place=place)
            if split_of(one) != split:
                continue
            for other in changes(one, attribute, number, rng):
                pair = _asked(one, other, attribute, number, rng)
                if pair is not None and split in (split_of(other), "unseen"):
                    return pair


def _check(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise unknown(what, value, known)


def _numbers(scene: Scene, attribute: str) -> list[int]:
    """Which objects a pair may change."""
    shown = [number for number, item in enumerate(scene.objects) if item.held_out]
    if attribute == "place":
        return [0]
    if attribute == "count":
        return [number for number in range(len(scene.objects)) if number not in shown]
    return shown or list(range(len(scene.objects)))


def _others(values: Iterable[str], value: str, rng: np.random.Generator) -> list[str]:
    """All values but one, in random order."""
    return [str(other) for other in rng.permutation([other for other in values if other != value])]


def _variants(
    item: SceneObject, rest: tuple[SceneObject, ...], attribute: str, scene: Scene, rng: np.random.Generator
) -> Iterator[SceneObject]:
    """The object with other values of an attribute, where `rest` and the canvas leave room."""
    canvas = (scene.width, scene.height)
    radii = np.array([*(other.radius for other in rest), item.radius])
    if attribute in ("colour", "shape"):
        values: Iterable[str] = COLOURS if attribute == "colour" else SHAPES
        for value in _others(values, getattr(item, attribute), rng):
            new = replace(item, colour=value) if attribute == "colour" else replace(item, shape=value)
            if not new.held_out:
                yield new
    elif attribute == "size":
        centres = np.array([[(other.x, other.y) for other in [*rest, item]]])
        for size in _others(SIZES, item.size, rng):
            for radius in rng.uniform(*SIZES[size], size=TRIES):
                radii[-1] = radius
                if clear(centres, radii, *canvas)[0]:
                    yield replace(item, size=size, radius=float(radius))
                    break
    else:
        # From top to bottom or back: positions of one half begin with the same word.
        half = 0.5 if item.y < 0.5 else 0.0
        points = rng.random((16 * TRIES, 2)) * (1, 0.5) + (0, half)
        kept = np.array([(other.x, other.y) for other in rest]).reshape(1, -1, 2)
        centres = np.concatenate([kept.repeat(len(points), 0), points[:, None]], axis=1)
        fitting = points[clear(centres, radii, *canvas)]
        sides = fitting[:, 0] < 0.5
        for left in rng.permutation([True, False]):
            yield from (replace(item, x=float(x), y=float(y)) for x, y in fitting[sides == left][:1])


def _asked(one: Scene, other: Scene, attribute: str, number: int, rng: np.random.Generator) -> ScenePair | None:
    """The pair with its question; None if nothing names the changed object alone in both scenes."""
    if attribute in ASKED_OF_SCENE:
        counts = (COUNTS[len(one.objects) - 1], COUNTS[len(other.objects) - 1])
        answers = (one.place, other.place) if attribute == "place" else counts
        index = None if attribute == "place" else number
        return ScenePair(one, other, attribute, index, ASKED_OF_SCENE[attribute], answers)
    item = one.objects[number]
    new = next(item for item in other.objects if item not in one.objects)
    allowed, template = ASKED[attribute]
    names = references(one, item, allowed)
    names = [name for name in names if name in references(other, new, allowed)]
    if not names:
        return None
    answers = (getattr(item, attribute), getattr(new, attribute))
    return ScenePair(one, other, attribute, number, template.format(names[rng.integers(len(names))]), answers)
