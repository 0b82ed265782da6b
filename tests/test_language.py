"""The words of the scenes: all that is said is known, and attribute words are found in a text."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.scenes.captions import STYLES, caption
from hooked_mm.scenes.language import WORD_CLASSES, attribute_words, vocabulary
from hooked_mm.scenes.questions import questions
from hooked_mm.scenes.world import SPLITS, Scene, scene

SCENES = st.builds(scene, st.sampled_from(SPLITS), st.integers(0, 5000))
NOTHING: dict[str, list[str]] = {name: [] for name in WORD_CLASSES}


def test_vocabulary_is_what_is_said() -> None:
    """Every word of 600 scenes' captions, prompts, questions and answers, those of the chat template, and no other."""
    said = {"user", "assistant", ":"}
    for number in range(600):
        item = scene("train", number)
        texts = [style.prompt for style in STYLES.values()] + [
            caption(item, style) for style in STYLES if style != "any"
        ]
        for question in questions(item, np.random.default_rng(number)):
            texts += [question.text, question.answer]
        said.update(word for text in texts for word in text.split())
    assert vocabulary() == sorted(said)


def test_no_word_is_of_two_classes() -> None:
    """A word tells its class."""
    words = [word for options in WORD_CLASSES.values() for word in options]
    assert len(set(words)) == len(words)


@given(SCENES)
def test_attribute_words_of_a_caption(item: Scene) -> None:
    """A full caption holds every attribute of every object in order, and the place."""
    assert attribute_words(caption(item)) == {
        **NOTHING,
        "shapes": [o.shape for o in item.objects],
        "colours": [o.colour for o in item.objects],
        "sizes": [o.size for o in item.objects],
        "positions": [o.position for o in item.objects],
        "places": [item.place],
    }


def test_attribute_words_are_whole_words() -> None:
    """Parts of words do not count; the "left" of "top left" is a position, any other a relation."""
    text = "a redder encircled ring at the top of the snowfield left of two top left stars"
    assert attribute_words(text) == {
        **NOTHING,
        "shapes": ["ring"],
        "positions": ["top left"],
        "counts": ["two"],
        "relations": ["left"],
    }
    assert attribute_words("") == NOTHING
