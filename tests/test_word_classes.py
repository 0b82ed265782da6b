"""The lists of words hold plain words, each once, and those of the scenes."""

from __future__ import annotations

import pytest

from hooked_mm.errors import BadInputError
from hooked_mm.scenes.world import COLOURS, COUNTS, PLACES, SHAPES
from hooked_mm.word_classes import WORD_CLASSES, words_of


@pytest.mark.parametrize("name", list(WORD_CLASSES))
def test_words_are_plain_and_stand_once(name: str) -> None:
    """Lower case letters alone, no word in two classes."""
    words = words_of(name)
    assert len(set(words)) == len(words) > 10
    assert all(word.isalpha() and word.islower() for word in words)
    others = {word for other, listed in WORD_CLASSES.items() if other != name for word in listed}
    assert not others & set(words)


def test_words_of_the_scenes_are_among_them() -> None:
    """So what is tried on a small model goes on with a large one."""
    assert set(COLOURS) <= set(words_of("colours"))
    assert set(PLACES) <= set(words_of("places"))
    assert set(SHAPES) <= set(words_of("shapes"))
    assert set(COUNTS) <= set(words_of("numbers"))


def test_unknown_classes_are_refused() -> None:
    """With the nearest name."""
    with pytest.raises(BadInputError, match="colours"):
        words_of("colors")
