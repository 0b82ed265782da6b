"""What is selected is what a reader of the data would count by hand; draws are fair and the same everywhere."""

from __future__ import annotations

from collections import Counter
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_mm.datasets.selection import Selection
from hooked_mm.errors import BadInputError

VOCABULARY = ["cat", "Cat", "cattle", "cats", "cat-like", "snow", "no", "traffic", "light", "red", "CAT", "lights"]
ASKED = ["cat", "no", "traffic light", "red", "Snow"]

texts = st.lists(st.sampled_from(VOCABULARY), max_size=5).map(" ".join)
row = st.tuples(texts, st.none() | texts, st.lists(texts, max_size=3), st.integers(0, 3))


def table(items: list[tuple]) -> tuple[list[str], dict[str, pa.ChunkedArray]]:
    """Ids and columns of rows of question, answer, captions, kind."""
    kinds = (pa.string(), pa.string(), pa.list_(pa.string()), pa.int64())
    names = ("question", "answer", "captions", "kind")
    columns = {
        name: pa.chunked_array([pa.array([item[place] for item in items], type=kind)])
        for place, (name, kind) in enumerate(zip(names, kinds, strict=True))
    }
    return [f"s{number}" for number in range(len(items))], columns


def says(text: str | None, asked: list[str]) -> bool:
    """Whether a text of words and spaces holds one of the words or phrases, as a person would look for it."""
    words = (text or "").lower().split()
    return any(
        words[start : start + len(parts)] == parts
        for parts in (item.lower().split() for item in asked)
        for start in range(len(words))
    )


@st.composite
def asked_of(draw: st.DrawFn) -> tuple[list[tuple], dict[str, dict[str, Any]]]:
    """Rows, and conditions that some of them can meet."""
    items = draw(st.lists(row, min_size=3, max_size=12))
    kinds = sorted({item[3] for item in items})
    chosen = draw(st.lists(st.sampled_from(range(len(items))), min_size=2, unique=True))
    return items, {
        "words": {
            "words": draw(st.lists(st.sampled_from(ASKED), min_size=1, max_size=3, unique=True)),
            "within": draw(st.sampled_from(["answer", "question", "captions"])),
        },
        "equal": {"equal": {"kind": draw(st.lists(st.sampled_from(kinds), min_size=1, unique=True))}},
        "ids": {"ids": [f"s{number}" for number in chosen]},
        "limit": {"limit": draw(st.integers(1, 4))},
    }


@settings(max_examples=60)
@given(asked_of())
def test_selection_is_what_a_reader_would_take(asked: tuple[list[tuple], dict[str, dict[str, Any]]]) -> None:
    """Any of the conditions together, then the first so many; if nothing is left, that is an error."""
    items, conditions = asked
    ids, columns = table(items)
    for names in chain.from_iterable(combinations(conditions, count) for count in range(5)):
        options = {key: value for name in names for key, value in conditions[name].items()}
        expected = [number for number, item in enumerate(items) if fits(f"s{number}", item, options)]
        if expected:
            assert Selection(**options).choose(ids, columns).tolist() == expected[: options.get("limit")]
        else:
            with pytest.raises(BadInputError, match="samples left"):
                Selection(**options).choose(ids, columns)


def fits(name: str, item: tuple, options: dict[str, Any]) -> bool:
    """Whether a row meets the conditions, looked at by itself."""
    question, answer, captions, kind = item
    texts = {"question": [question], "answer": [answer], "captions": captions}[options.get("within", "answer")]
    return (
        ("words" not in options or any(says(text, options["words"]) for text in texts))
        and ("equal" not in options or kind in options["equal"]["kind"])
        and ("ids" not in options or name in options["ids"])
    )


@given(st.integers(2, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), st.permutations(range(40)))
def test_draws_hold_each_other_and_do_not_depend_on_order(
    size: int, few: int, more: int, seed: int, order: list[int]
) -> None:
    """The smaller draw is within the larger; the same samples are drawn from the data set in another order."""
    few, more = sorted((few, more))
    items = [("", "cat" if number % 2 else "no", [], 0) for number in range(size)]
    ids, columns = table(items)
    small, large = (Selection(limit=n, seed=seed).choose(ids, columns).tolist() for n in (few, more))
    assert len(small) == min(few, size)
    assert small == sorted(small)
    assert set(small) <= set(large)
    shuffled = [number for number in order if number < size]
    again = Selection(limit=few, seed=seed).choose([ids[number] for number in shuffled], columns)
    assert {shuffled[place] for place in again.tolist()} == set(small)
    # Filtering first and drawing then is drawing from what the filter leaves.
    cats = [number for number in range(size) if number % 2]
    got = Selection(words=["cat"], limit=few, seed=seed).choose(ids, columns).tolist()
    left = {name: column.take(cats) for name, column in columns.items()}
    drawn = Selection(limit=few, seed=seed).choose([ids[number] for number in cats], left).tolist()
    assert got == [cats[place] for place in drawn]


def test_draws_are_fair() -> None:
    """Over 600 seeds each of ten samples is among the three drawn about as often; 5 standard deviations are 56."""
    ids, columns = table([("", "", [], 0)] * 10)
    counts: Counter[int] = Counter()
    for seed in range(600):
        counts.update(Selection(limit=3, seed=seed).choose(ids, columns).tolist())
    assert sum(counts.values()) == 1800
    assert all(abs(counts[number] - 180) < 56 for number in range(10))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A cat.", True),
        ("the cat, asleep", True),
        ("CAT!", True),
        ("cattle", False),
        ("a cat's tail", False),
        ("'cat'", True),
        ("a cat-like thing", False),
        ("scatter", False),
        ("tom cat\nsleeps", True),
    ],
)
def test_words_are_whole_words(text: str, found: bool) -> None:
    """Never a part of another word."""
    ids, columns = table([(text, None, [], 0), ("a cat", None, [], 0)])
    assert Selection(words=["cat"], within="question").choose(ids, columns).tolist() == ([0, 1] if found else [1])


def test_word_classes() -> None:
    """A named list, beside words of one's own."""
    ids, columns = table([("", "a green cross", [], 0), ("", "a greenish cat", [], 0), ("", "a dog", [], 0)])
    assert Selection(word_class="colours").choose(ids, columns).tolist() == [0]
    assert Selection(word_class="colours", words=["dog"]).choose(ids, columns).tolist() == [0, 2]


def test_ids_from_a_file(tmp_path: Path) -> None:
    """One per line, blank lines and white space aside; the order is the data set's."""
    ids, columns = table([("", "", [], 0)] * 4)
    file = tmp_path / "ids.txt"
    file.write_text("s3\n\n s1 \r\n")
    for given_ids in (file, str(file), ["s3", "s1"]):
        assert Selection(ids=given_ids).choose(ids, columns).tolist() == [1, 3]
    assert Selection(ids=file).describe() == Selection(ids=["s3", "s1"]).describe()
    assert Selection(ids=file).describe() != Selection(ids=["s3", "s2"]).describe()


COLUMNS = {
    "answer": ["yes", "2", None, "no"],
    "count": [1, 2, None, 4],
    "share": [0.5, 1.0, 2.0, None],
    "odd": [True, False, True, None],
    "tags": [["a"], [], ["b"], None],
}


@pytest.mark.parametrize(
    ("equal", "kept"),
    [
        ({"answer": "yes"}, [0]),
        ({"answer": 2}, [1]),
        ({"answer": ["no", "yes"]}, [0, 3]),
        ({"count": 4}, [3]),
        ({"share": 1}, [1]),
        ({"odd": True}, [0, 2]),
        ({"odd": True, "count": 1}, [0]),
    ],
)
def test_equal_values_of_every_type(equal: dict[str, Any], kept: list[int]) -> None:
    """A value as the column's type has it; null equals nothing."""
    columns = {name: pa.chunked_array([values[:1], values[1:]]) for name, values in COLUMNS.items()}
    assert Selection(equal=equal).choose(list("wxyz"), columns).tolist() == kept


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"equal": {"answer": True}}, ["column 'answer' holds string", "put words such as yes in quotes"]),
        ({"equal": {"count": "4"}}, ["column 'count' holds int64", "'4' (str)"]),
        ({"equal": {"count": 1.5}}, ["1.5 (float)"]),
        ({"equal": {"odd": 1}}, ["holds bool", "1 (int)"]),
        ({"equal": {"answer": None}}, ["None (NoneType)"]),
        ({"equal": {"tags": "a"}}, ["column 'tags' holds list", "look for words in it"]),
        ({"equal": {"answer": []}}, ["no value for 'answer'"]),
        (
            {"equal": {"answer": "yess"}},
            ["answer='yess'; nearest: yes; there are 4 values: yes, 2, None, no"],
        ),
        ({"equal": {"answers": "yes"}}, ["no column 'answers'; nearest: answer"]),
        ({"equal": {"odd": False, "count": 4}}, ["none of the 1 samples left has count=4"]),
        ({"words": ["maybe"]}, ["none of the 4 samples left has one of ['maybe'] in its answer"]),
        ({"words": ["a"], "within": "count"}, ["'count', which holds int64", "answer"]),
        ({"words": ["a"], "within": "question"}, ["no column 'question'"]),
        ({"ids": ["x", "xx", "q"]}, ["2 of the 3 ids", "the first is 'xx'", "look like 'w'"]),
        ({"ids": []}, ["names no sample"]),
        ({"ids": "nowhere.txt"}, ["'nowhere.txt' does not exist"]),
        ({"words": "cat"}, ["words='cat' is one text; write ['cat']"]),
        ({"words": ["a", " "]}, ["must be non-empty"]),
        ({"word_class": "colors"}, ["no word class 'colors'; nearest: colours"]),
        ({"limit": 0}, ["limit=0"]),
        ({"seed": 1}, ["seed=1 without a limit"]),
    ],
)
def test_refusals_name_value_and_remedy(options: dict[str, Any], parts: list[str]) -> None:
    """What does not exist, can't be compared or leaves nothing."""
    columns = {name: pa.chunked_array([values]) for name, values in COLUMNS.items()}
    with pytest.raises(BadInputError) as error:
        Selection(**options).choose(list("wxyz"), columns)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_file_of_ids_must_be_text(tmp_path: Path) -> None:
    """A picture given by mistake is named."""
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(BadInputError, match=r"x\.jpg' is no text file"):
        Selection(ids=tmp_path / "x.jpg").wanted_ids()


def test_the_description_holds_what_was_asked() -> None:
    """Defaults are left out, so that the same selection reads the same however it was written."""
    assert Selection().describe() == Selection(words=[], ids=None, equal={}, within="question").describe() == {}
    assert Selection(limit=2, seed=0).describe() == {"limit": 2, "seed": 0}
    assert Selection(words=["a"]).describe() == {"words": ["a"], "within": "answer"}
