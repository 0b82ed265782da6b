"""Questions about scenes with their one right answer.

An object is referred to by what names it alone: its shape, its colour, both, or where it is. A question that a scene
does not allow (a shape that two objects share, a relation that is doubtful) is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hooked_mm.scenes.world import COLOURS, COUNTS, HELD_OUT, SHAPES, Scene, SceneObject, relations

QUESTION_TYPES = (
    "colour",
    "shape",
    "size",
    "where",
    "shape at",
    "place",
    "count",
    "is there a shape",
    "is there a colour",
    "is there a pair",
    "relation",
)


@dataclass(frozen=True)
class Question:
    """A question of a known type with its one right answer; `about`: the object whose attribute is asked for."""

    type: str
    text: str
    answer: str
    about: SceneObject | None = None


REFERENCES = {
    "shape": lambda item: f"the {item.shape}",
    "colour": lambda item: f"the {item.colour} object",
    "colour shape": lambda item: f"the {item.colour} {item.shape}",
    "position": lambda item: f"the object at the {item.position}",
}
"""By the attributes it uses: how an object can be referred to."""


def references(scene: Scene, item: SceneObject, allowed: Sequence[str]) -> list[str]:
    """The phrases of the allowed kinds that name this object and no other of the scene."""
    found = []
    for kind in allowed:
        names = kind.split()
        alike = [all(getattr(other, name) == getattr(item, name) for name in names) for other in scene.objects]
        if sum(alike) == 1:
            found.append(REFERENCES[kind](item))
    return found


ASKED = {
    "colour": (("shape", "position"), "what colour is {} ?"),
    "shape": (("colour",), "what shape is {} ?"),
    "size": (("shape", "colour", "colour shape", "position"), "is {} big or small ?"),
    "position": (("shape", "colour", "colour shape"), "where is {} ?"),
}
"""Attribute of an object -> the references that do not give it away, and the question."""

ASKED_OF_SCENE = {"place": "what place is this ?", "count": "how many objects are there ?"}
"""What is asked about no object in particular."""


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of every type that the scene allows; yes/no questions are balanced.

    The negatives of "is there a COLOUR SHAPE ?" are hard where the scene allows: both words are true of the scene,
    but of different objects. A held-out pair that the scene does not show is never asked about.
    """
    found = [
        *_about_objects(scene, rng),
        Question("place", ASKED_OF_SCENE["place"], scene.place),
        Question("count", ASKED_OF_SCENE["count"], COUNTS[len(scene.objects) - 1]),
        *_presence(scene, rng),
        *_relation(scene, rng),
    ]
    return sorted(found, key=lambda question: QUESTION_TYPES.index(question.type))


def _pick(options: Sequence, rng: np.random.Generator) -> object:
    return options[int(rng.integers(len(options)))]


def _about_objects(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for attribute, (allowed, template) in ASKED.items():
        options = [(item, name) for item in scene.objects for name in references(scene, item, allowed)]
        if options:
            item, name = options[rng.integers(len(options))]
            kind = "where" if attribute == "position" else attribute
            yield Question(kind, template.format(name), getattr(item, attribute), item)
    options = [(item, item.position) for item in scene.objects if references(scene, item, ("position",))]
    if options:
        item, where = options[rng.integers(len(options))]
        yield Question("shape at", f"what shape is at the {where} ?", item.shape, item)


def _presence(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    item = scene.objects[rng.integers(len(scene.objects))]
    shapes, colours = {o.shape for o in scene.objects}, {o.colour for o in scene.objects}
    shape = item.shape if rng.random() < 0.5 else _pick([s for s in SHAPES if s not in shapes], rng)
    yield Question("is there a shape", f"is there a {shape} ?", _yes(shape in shapes))
    colour = item.colour if rng.random() < 0.5 else _pick([c for c in COLOURS if c not in colours], rng)
    yield Question("is there a colour", f"is there a {colour} object ?", _yes(colour in colours))
    pairs = {(o.colour, o.shape) for o in scene.objects}
    pair = (item.colour, item.shape)
    if rng.random() < 0.5:
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in pairs and HELD_OUT.get(s) != c]
        hard = [(c, s) for c, s in absent if c in colours and s in shapes]
        half = [(c, s) for c, s in absent if (c in colours) != (s in shapes)]
        # With two or more objects, seven in ten negatives are made of words that are both true of the scene.
        pair = _pick(hard if hard and rng.random() < 0.7 else half, rng)  # type: ignore[assignment]
    yield Question("is there a pair", f"is there a {pair[0]} {pair[1]} ?", _yes(pair in pairs))


def _relation(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    names = {item: references(scene, item, ("shape", "colour shape")) for item in scene.objects}
    options = [
        (one, other, word)
        for one in scene.objects
        for other in scene.objects
        if one is not other and names[one] and names[other]
        for word in relations(one, other)
    ]
    if options:
        one, other, word = options[rng.integers(len(options))]
        asked = "left or right of" if word in ("left", "right") else "above or below"
        text = f"is {_pick(names[one], rng)} {asked} {_pick(names[other], rng)} ?"
        yield Question("relation", text, word)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
