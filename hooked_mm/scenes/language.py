"""What can be said about a scene: its caption, and questions with their answers.

Captions name attributes *after* the noun ("a circle that is big and red"), so that at the position which predicts an
attribute no earlier token gives it away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hooked_mm.scenes.world import COLOURS, COUNTS, PLACES, POSITIONS, SHAPES, SIZES, Scene, SceneObject

CAPTION_PROMPT = "describe the scene ."

WORD_CLASSES: dict[str, tuple[str, ...]] = {
    "shapes": SHAPES,
    "colours": tuple(COLOURS),
    "sizes": tuple(SIZES),
    "positions": tuple(POSITIONS),
    "places": PLACES,
    "counts": COUNTS,
}
"""Named lists of words, usable wherever a token-of-interest selector takes words."""


@dataclass(frozen=True)
class Question:
    """A question of a known type with its one right answer."""

    type: str
    text: str
    answer: str


def _object_phrase(item: SceneObject) -> str:
    return f"a {item.shape} that is {item.size} and {item.colour} at the {item.position}"


def caption(scene: Scene) -> str:
    """The scene's one caption: objects in reading order, then the place."""
    return " and ".join(_object_phrase(item) for item in scene.objects) + f" in the {scene.place} ."


def caption_slots(text: str, words: dict[str, tuple[str, ...]] = WORD_CLASSES) -> dict[str, list[str]]:
    """The attribute words of a caption in order of appearance, per word class (how captions are scored)."""
    tokens = text.split()
    found: dict[str, list[str]] = {name: [] for name in words}
    for name, options in words.items():
        for start in range(len(tokens)):
            for option in options:
                parts = option.split()
                if tokens[start : start + len(parts)] == parts:
                    found[name].append(option)
    return found


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of every type about the scene; yes/no questions are balanced.

    The negatives of "is there a COLOUR SHAPE ?" are hard where the scene allows: both words are true of the scene,
    but of different objects.
    """
    item = scene.objects[rng.integers(len(scene.objects))]
    absent_shapes = [s for s in SHAPES if all(o.shape != s for o in scene.objects)]
    absent_colours = [c for c in COLOURS if all(o.colour != c for o in scene.objects)]

    def pick(options: list[str]) -> str:
        return options[rng.integers(len(options))]

    yes_shape, yes_colour, yes_pair = rng.random(3) < 0.5
    others = [o for o in scene.objects if o is not item]
    wrong_pair = (item.colour, others[0].shape) if others else (item.colour, pick(absent_shapes))
    if rng.random() < 0.3:
        wrong_pair = (pick(absent_colours), item.shape)
    pair = (item.colour, item.shape) if yes_pair else wrong_pair
    return [
        Question("colour", f"what colour is the {item.shape} ?", item.colour),
        Question("shape", f"what shape is the {item.colour} object ?", item.shape),
        Question("size", f"is the {item.shape} big or small ?", item.size),
        Question("where", f"where is the {item.shape} ?", item.position),
        Question("shape at", f"what shape is at the {item.position} ?", item.shape),
        Question("place", "what place is this ?", scene.place),
        Question("count", "how many objects are there ?", COUNTS[len(scene.objects) - 1]),
        Question(
            "is there a shape", f"is there a {item.shape if yes_shape else pick(absent_shapes)} ?", _yes(yes_shape)
        ),
        Question(
            "is there a colour",
            f"is there a {item.colour if yes_colour else pick(absent_colours)} object ?",
            _yes(yes_colour),
        ),
        Question("is there a pair", f"is there a {pair[0]} {pair[1]} ?", _yes(yes_pair)),
    ]


def _yes(value: bool | np.bool_) -> str:
    return "yes" if value else "no"


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
)


def vocabulary() -> list[str]:
    """Every word that captions, prompts, questions and answers can contain, sorted."""
    fixed = (
        f"{CAPTION_PROMPT} user assistant : a that is and at the in what colour shape object ? big or small where "
        "place this how many objects are there yes no"
    )
    words = set(fixed.split())
    for options in WORD_CLASSES.values():
        words.update(word for option in options for word in option.split())
    return sorted(words)
