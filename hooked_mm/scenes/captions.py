"""Captions of scenes, in a style that the prompt asks for, or in none.

| style | prompt | caption |
|---|---|---|
| `any` | describe the scene . | in `full` seven times of ten, else in `short` |
| `full` | describe the scene in full . | a circle that is big and red at the top left in the snow . |
| `short` | describe the scene in short . | a big red circle at the top left in the snow . |
| `colourless` | describe the scene without colours . | a big circle at the top left in the snow . |
| `place` | describe only the place . | in the snow . |
| `colours` | describe only the colours . | red . |
| `shapes` | describe only the shapes . | a circle . |

In `full`, attributes come *after* the noun, so that at the position which predicts an attribute no earlier token gives
it away (but reading order narrows positions down); in `short` before it. The default prompt asks for no style, so that
style is the model's own, to be steered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hooked_mm.errors import unknown
from hooked_mm.scenes.world import Scene, SceneObject

Phrase = tuple[str, SceneObject | None]
"""Words, and the object that they are about."""


@dataclass(frozen=True)
class Style:
    """A way to describe a scene: the prompt that asks for it, and what it says of an object and of the place."""

    prompt: str
    of_object: Callable[[SceneObject], str] | None = None
    of_place: Callable[[Scene], str] | None = None


def _place(scene: Scene) -> str:
    return f"in the {scene.place}"


STYLES = {
    "full": Style(
        "describe the scene in full .",
        lambda item: f"a {item.shape} that is {item.size} and {item.colour} at the {item.position}",
        _place,
    ),
    "short": Style(
        "describe the scene in short .",
        lambda item: f"a {item.size} {item.colour} {item.shape} at the {item.position}",
        _place,
    ),
    "colourless": Style(
        "describe the scene without colours .",
        lambda item: f"a {item.size} {item.shape} at the {item.position}",
        _place,
    ),
    "place": Style("describe only the place .", None, _place),
    "colours": Style("describe only the colours .", lambda item: item.colour),
    "shapes": Style("describe only the shapes .", lambda item: f"a {item.shape}"),
    "any": Style("describe the scene ."),
}

WORDINGS = {"full": 0.7, "short": 0.3}
"""The styles that the default prompt may be answered in, with their shares in training."""

CAPTION_PROMPT = STYLES["any"].prompt
"""The prompt that asks for a caption and for no style."""


def phrases(scene: Scene, style: str = "full") -> list[Phrase]:
    """The scene's caption in pieces, each with the object it is about: objects in reading order, then the place.

    Raises:
        BadInputError: For an unknown style, or `any`, which is no wording of its own.
    """
    if style not in STYLES or style == "any":
        raise unknown("wording", style, [name for name in STYLES if name != "any"])
    chosen = STYLES[style]
    pieces: list[Phrase] = []
    for item in scene.objects if chosen.of_object else ():
        assert chosen.of_object is not None
        pieces += [("and", None)] if pieces else []
        pieces.append((chosen.of_object(item), item))
    if chosen.of_place:
        pieces.append((chosen.of_place(scene), None))
    return [*pieces, (".", None)]


def caption(scene: Scene, style: str = "full") -> str:
    """The scene's caption in a style."""
    return " ".join(words for words, _ in phrases(scene, style))


def right_captions(scene: Scene, style: str = "any") -> tuple[str, ...]:
    """Every right answer to the style's prompt, the commonest first."""
    return tuple(caption(scene, name) for name in (WORDINGS if style == "any" else [style]))


def wording(rng: np.random.Generator, style: str = "any") -> str:
    """The style to answer in: the one asked for; for `any`, one of `WORDINGS` by chance."""
    return str(rng.choice(list(WORDINGS), p=list(WORDINGS.values()))) if style == "any" else style
