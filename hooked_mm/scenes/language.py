"""The words of the scenes: attribute words by class, and everything that can be said or asked."""

from __future__ import annotations

from hooked_mm.scenes.captions import STYLES
from hooked_mm.scenes.world import COLOURS, COUNTS, PLACES, POSITIONS, RELATIONS, SHAPES, SIZES

WORD_CLASSES: dict[str, tuple[str, ...]] = {
    "shapes": SHAPES,
    "colours": tuple(COLOURS),
    "sizes": tuple(SIZES),
    "positions": POSITIONS,
    "places": PLACES,
    "counts": COUNTS,
    "relations": RELATIONS,
}
"""What scenes are described by."""

DESCRIBED = ("shapes", "colours", "sizes", "positions", "places")
"""The classes whose words captions are made of."""


def vocabulary() -> list[str]:
    """Every word that captions, prompts, questions and answers can contain, sorted."""
    fixed = (
        "user assistant : a that is and at the in what colour shape object objects ? big or small where place this how "
        "many are there yes no of"
    )
    words = set(fixed.split())
    for style in STYLES.values():
        words.update(style.prompt.split())
    for options in WORD_CLASSES.values():
        words.update(word for option in options for word in option.split())
    return sorted(words)


def attribute_words(text: str) -> dict[str, list[str]]:
    """The attribute words of a text in order of appearance, per word class (how captions are scored).

    The longest reading counts: the "left" of "top left" is part of a position and no relation.
    """
    words = text.split()
    found: dict[str, list[str]] = {name: [] for name in WORD_CLASSES}
    start = 0
    while start < len(words):
        readings = [
            (len(option.split()), name, option)
            for name, options in WORD_CLASSES.items()
            for option in options
            if words[start : start + len(option.split())] == option.split()
        ]
        length, name, option = max(readings, default=(1, "", ""))
        if name:
            found[name].append(option)
        start += length
    return found
