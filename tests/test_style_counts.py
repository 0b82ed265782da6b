"""Style words in captions: whole words, against splitting by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from steering.style_counts import STYLES_OF_WORDS, StyleCounts, style_counts

WORDS = st.sampled_from("red Blue scared beach beaches happy sad unhappy cat reddish goldfish gold river".split())


@given(captions=st.lists(st.lists(WORDS, max_size=8).map(" ".join), max_size=12), size=st.integers(1, 5))
def test_counts_are_those_of_splitting_by_hand(captions: list[str], size: int) -> None:
    """In batches of any size."""
    metric = StyleCounts()
    metric.update([])
    for start in range(0, len(captions), size):
        metric.update(captions[start : start + size])
    found = metric.compute()
    assert found == style_counts(captions)
    for style, words in STYLES_OF_WORDS.items():
        hits = [sum(word in words for word in caption.lower().split()) for caption in captions]
        assert found[style] == (sum(map(bool, hits)), sum(hits), len(captions))


def test_only_whole_words_count() -> None:
    """ "red" is not in "scared" or "t-shirt-red"; punctuation and case do not hide a word."""
    captions = ["A scared, reddish cat.", "RED! Red, (red) 'red'", "at the beach's end, by the sea"]
    assert style_counts(captions, {"colour": ["red"], "place": ["beach", "sea"]}) == {
        "colour": (1, 4, 3),
        "place": (1, 1, 3),
    }


def test_the_styles_share_no_word() -> None:
    """Else one style's steering would count as another's."""
    every = [word for words in STYLES_OF_WORDS.values() for word in words]
    assert len(every) == len(set(every))
    assert list(STYLES_OF_WORDS) == ["colour", "place", "sentiment"]


def test_refuses() -> None:
    """A text for a list, a style without words."""
    with pytest.raises(BadInputError, match="one text"):
        style_counts("a red cat")
    with pytest.raises(BadInputError, match="non-empty"):
        StyleCounts({"none": []}).update(["a"])
