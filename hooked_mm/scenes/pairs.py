"""Pairs of scenes that differ in one attribute of one object, or in the place: for patching and causal tests.

Everything else stays to the pixel: the background's texture, the other objects, where the object is. A question is
asked that has another answer in each of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hooked_mm.errors import BadInputError, nearest
from hooked_mm.scenes.questions import Question, questions
from hooked_mm.scenes.world import (
    COLOURS,
    HELD_OUT,
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

ATTRIBUTES = {"colour": "colour", "shape": "shape", "size": "size", "position": "where", "place": "place"}
"""What two scenes can differ in, and the type of question that asks for it."""

TRIES = 40
"""How often a scene is changed before another one is taken: a change may lead to another split, or have no place."""


@dataclass(frozen=True)
class ScenePair:
    """Two scenes, what differs, and a question with the answer in each.

    Attributes:
        one: The first scene, of the split asked for.
        other: The same but for `attribute`.
        attribute: One of `ATTRIBUTES`.
        index: The number of the changed object in `one.objects`; None where the place changes.
        question: Asked of both.
        answers: The right answer for `one` and for `other`.
    """

    one: Scene
    other: Scene
    attribute: str
    index: int | None
    question: str
    answers: tuple[str, str]


def _options(item: SceneObject, attribute: str) -> list[SceneObject]:
    values: dict[str, Sequence[str]] = {"colour": tuple(COLOURS), "shape": SHAPES}
    changed = [replace(item, **{attribute: value}) for value in values[attribute] if value != getattr(item, attribute)]
    return [new for new in changed if HELD_OUT.get(new.shape) != new.colour]


def changed(scene: Scene, attribute: str, index: int, rng: np.random.Generator) -> Scene | None:
    """The scene with another value of one attribute, drawn at random; None where nothing else would fit.

    A changed size keeps the centre, a changed position keeps all else. No held-out pair of shape and colour comes up.
    """
    if attribute == "place":
        return replace(scene, place=str(rng.choice([place for place in PLACES if place != scene.place])))
    item, rest = scene.objects[index], scene.objects[:index] + scene.objects[index + 1 :]
    if attribute in ("colour", "shape"):
        options = _options(item, attribute)
        return replace(scene, objects=reading_order([*rest, options[rng.integers(len(options))]]))
    if attribute == "size":
        size = next(name for name in SIZES if name != item.size)
        tries = [replace(item, size=size, radius=float(rng.uniform(*SIZES[size]))) for _ in range(32)]
    else:
        tries = [replace(item, x=float(x), y=float(y)) for x, y in rng.random((256, 2))]
        tries = [new for new in tries if new.position != item.position]
    for new in tries:
        objects = [*rest, new]
        centres = np.array([[(o.x, o.y) for o in objects]])
        if clear(centres, np.array([o.radius for o in objects]), scene.width, scene.height)[0]:
            return replace(scene, objects=reading_order(objects))
    return None


def scene_pair(split: str, index: int, attribute: str, seed: int = 0, *, count: int | None = None) -> ScenePair:
    """Pair number `index` of a split for an attribute; `count`: only scenes with so many objects.

    Both scenes belong to the split; for `unseen`, at least the first does (a changed pair is a seen one).

    Raises:
        BadInputError: For an unknown split or attribute.
    """
    for value, known, what in ((split, SPLITS, "split"), (attribute, ATTRIBUTES, "attribute")):
        if value not in known:
            raise BadInputError(f"no {what} {value!r}{nearest(value, known)}; there are: {', '.join(known)}")
    rng = np.random.default_rng([SPLITS.index(split), seed, index, 2, list(ATTRIBUTES).index(attribute)])
    while True:
        one = sample_scene(rng, unseen=split == "unseen", count=count)
        if split_of(one) != split:
            continue
        number = int(rng.integers(len(one.objects)))
        item = None if attribute == "place" else one.objects[number]
        for _ in range(TRIES):
            other = changed(one, attribute, number, rng)
            if other is None or (split_of(other) != split and split != "unseen"):
                continue
            asked = _question(one, other, attribute, item, rng)
            if asked is not None:
                text, answers = asked
                return ScenePair(one, other, attribute, None if item is None else number, text, answers)


def _question(
    one: Scene, other: Scene, attribute: str, item: SceneObject | None, rng: np.random.Generator
) -> tuple[str, tuple[str, str]] | None:
    """A question about the changed object that names it alone in both scenes; None if there is none."""
    kind = ATTRIBUTES[attribute]
    for _ in range(8):
        first = next((q for q in questions(one, rng) if q.type == kind and q.about == item), None)
        second = None if first is None else _same(first, other, kind, rng)
        if first is not None and second is not None and first.answer != second.answer:
            return first.text, (first.answer, second.answer)
    return None


def _same(asked: Question, scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    tries = (q for _ in range(24) for q in questions(scene, rng) if q.type == kind)
    return next((q for q in tries if q.text == asked.text), None)
