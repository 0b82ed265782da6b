"""Transitions between answers against counting in a plain loop, and whole answers against XL-VLMs' substrings."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from steering.answer_counts import AnswerCounts, plain, transitions

ANSWERS = st.sampled_from(["no", "none", "No.", " no ", "yes", "1", "10", "white", "a cat", 'é\n"', "", "."])


@given(pairs=st.lists(st.tuples(ANSWERS, ANSWERS), max_size=30), size=st.integers(1, 7))
def test_counts_are_those_of_a_plain_loop(pairs: list[tuple[str, str]], size: int) -> None:
    """In batches of any size; before and after are the margins of the pairs."""
    metric = AnswerCounts()
    for start in range(0, len(pairs), size):
        metric.update(*zip(*pairs[start : start + size], strict=True))
    if not pairs:
        metric.update([], [])
    found = metric.compute()
    short = [(plain(old), plain(new)) for old, new in pairs]
    assert found["samples"] == len(pairs)
    assert found["pairs"] == {pair: short.count(pair) for pair in short}
    assert found["before"] == {old: [pair[0] for pair in short].count(old) for old, _ in short}
    assert found["after"] == {new: [pair[1] for pair in short].count(new) for _, new in short}
    changed = [old != new for old, new in short]
    assert found["changed"] == pytest.approx(sum(changed) / len(short) if short else math.nan, nan_ok=True)
    values = list(found["pairs"].values())
    assert values == sorted(values, reverse=True)


def test_by_hand() -> None:
    """Yes to no, with case, a full stop and white space that make no change."""
    found = transitions(["Yes", "yes.", "no", "no"], ["no", " NO. ", "No", "none"])
    assert found == {("yes", "no"): 2, ("no", "no"): 1, ("no", "none"): 1}
    assert list(found) == [("yes", "no"), ("no", "no"), ("no", "none")]
    assert [plain(text) for text in ("U.S.", " Two cats . ", "...")] == ["u.s", "two cats", ".."]


def test_xl_vlms_counts_are_of_whole_answers_not_of_substrings() -> None:
    """Counting "no" in texts finds it in "none", "snow" and "not sure", "1" in "10" and "red" in "scared"."""
    metric = AnswerCounts()
    metric.update(["none", "snow", "10", "scared"], ["not sure", "no", "1", "red"])
    found = metric.compute()
    assert [found["before"].get(word, 0) for word in ("no", "1", "red")] == [0, 0, 0]
    assert [found["after"].get(word, 0) for word in ("no", "1", "red")] == [1, 1, 1]


def test_answers_must_belong_together() -> None:
    """One after for each before; a text is not a list of letters."""
    with pytest.raises(BadInputError, match="2 before, 1 after"):
        transitions(["a", "b"], ["a"])
    with pytest.raises(BadInputError, match="one text"):
        AnswerCounts().update("ab", "ab")
