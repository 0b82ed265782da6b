"""Captions: what each style says, word for word, and read back by a parser that knows only grammar."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from hooked_mm.scenes.captions import CAPTION_PROMPT, STYLES, WORDINGS, caption, phrases, right_captions, wording
from hooked_mm.scenes.world import SPLITS, Scene, SceneObject, scene

SCENES = st.builds(scene, st.sampled_from(SPLITS), st.integers(0, 5000))
SPOKEN = tuple(name for name in STYLES if name != "any")
TWO = Scene(
    "sea",
    (
        SceneObject("ring", "blue", "big", 0.25, 0.3, 0.19),
        SceneObject("star", "red", "small", 0.7, 0.7, 0.12),
    ),
    0,
)
ONE = Scene("snow", TWO.objects[1:], 0)

BY_HAND = {
    "full": "a ring that is big and blue at the top left and a star that is small and red at the bottom right "
    "in the sea .",
    "short": "a big blue ring at the top left and a small red star at the bottom right in the sea .",
    "colourless": "a big ring at the top left and a small star at the bottom right in the sea .",
    "place": "in the sea .",
    "colours": "blue and red .",
    "shapes": "a ring and a star .",
}

GRAMMAR = {
    "full": r"a (?P<shape>\w+) that is (?P<size>\w+) and (?P<colour>\w+) at the (?P<position>\w+ \w+)",
    "short": r"a (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+) at the (?P<position>\w+ \w+)",
    "colourless": r"a (?P<size>\w+) (?P<shape>\w+) at the (?P<position>\w+ \w+)",
    "colours": r"(?P<colour>\w+)",
    "shapes": r"a (?P<shape>\w+)",
}


def test_captions_by_hand() -> None:
    """Every style of a scene of two objects, and of one."""
    assert {style: caption(TWO, style) for style in SPOKEN} == BY_HAND
    assert caption(ONE) == "a star that is small and red at the bottom right in the snow ."
    assert caption(ONE, "colours") == "red ."


@given(SCENES, st.sampled_from([name for name in SPOKEN if name != "place"]))
def test_captions_can_be_read_back(item: Scene, style: str) -> None:
    """What the grammar finds is every object in order with its attributes, and the place: nothing lost or added."""
    body, _, place = caption(item, style).removesuffix(" .").partition(" in the ")
    assert place == (item.place if style in ("full", "short", "colourless") else "")
    rule = GRAMMAR[style]
    unnamed = re.sub(r"\?P<\w+>", "", rule)
    assert re.fullmatch(f"{unnamed}(?: and {unnamed})*", body)
    found = [match.groupdict() for match in re.finditer(rule + r"(?= and|$)", body)]
    assert len(found) == len(item.objects)
    for read, o in zip(found, item.objects, strict=True):
        assert read == {name: getattr(o, name) for name in read}


@given(SCENES, st.sampled_from(SPOKEN))
def test_phrases_are_the_caption_in_pieces(item: Scene, style: str) -> None:
    """Joined they are the caption; each object's phrase stands with that object, in order; the rest with none."""
    pieces = phrases(item, style)
    assert " ".join(words for words, _ in pieces) == caption(item, style)
    about = [o for _, o in pieces if o is not None]
    assert about == ([] if style == "place" else list(item.objects))
    assert all(words in ("and", ".", f"in the {item.place}") for words, o in pieces if o is None)


def test_full_names_no_attribute_before_its_noun() -> None:
    """In `full` size and colour come after the shape, in `short` before it."""
    full, short = caption(ONE, "full").split(), caption(ONE, "short").split()
    assert full.index("star") < full.index("small") < full.index("red")
    assert short.index("small") < short.index("red") < short.index("star")


def test_right_captions() -> None:
    """The default prompt has two right answers, the commonest first; every other prompt one."""
    assert right_captions(TWO) == (BY_HAND["full"], BY_HAND["short"])
    assert all(right_captions(TWO, style) == (BY_HAND[style],) for style in SPOKEN)


def test_wordings_of_the_default_prompt() -> None:
    """Asked for no style, seven of ten are in full; a style that is asked for is given."""
    rng = np.random.default_rng(0)
    drawn = [wording(rng) for _ in range(1000)]
    assert set(drawn) == set(WORDINGS)
    assert drawn.count("full") / 1000 == pytest.approx(0.7, abs=4 * np.sqrt(0.21 / 1000))
    assert [wording(rng, style) for style in SPOKEN] == list(SPOKEN)


def test_prompts_tell_styles_apart() -> None:
    """No two styles have one prompt, and the default asks for none."""
    prompts = [style.prompt for style in STYLES.values()]
    assert len(set(prompts)) == len(prompts)
    assert CAPTION_PROMPT == "describe the scene ."


@pytest.mark.parametrize("style", ["any", "ful"])
def test_a_style_without_words_is_refused(style: str) -> None:
    """The error names it, and what there is."""
    with pytest.raises(BadInputError, match=f"{style}.*colourless"):
        caption(ONE, style)
