"""Rows are paired as a search over all pairs of rows pairs them, whatever their order and whatever is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from hooked_mm.paired_rows import PairedRows, pair_rows, split_samples
from hooked_mm.store import ActivationStore

Row = tuple[str, str, int | None, str | None]
"""Sample, selector, position, word."""


def make(
    path: Path, rows: Sequence[Row], texts: dict[str, str | None], hooks: dict[str, int] | None = None, **made_by: Any
) -> ActivationStore:
    """A store of these rows; `texts` has every sample with what was read."""
    return ActivationStore.from_arrays(
        path,
        {hook: torch.arange(float(len(rows) * d)).reshape(len(rows), d) for hook, d in (hooks or {"h": 2}).items()},
        [dict(zip(("sample", "selector", "position", "word"), row, strict=True)) for row in rows],
        [{"sample": name, "prompt": "what ?", "text": text} for name, text in texts.items()],
        made_by,
    )


def by_search(one: Sequence[Row], other: Sequence[Row], by: str) -> list[tuple[int, int]]:
    """The pairs, by going through all rows of both for each: the n-th row of a kind with the n-th of that kind."""

    def kind(row: Row) -> tuple:
        sample, selector, position, word = row
        return (sample, selector, {"position": position, "word": word, "sample": None}[by])

    def rank(rows: Sequence[Row], index: int) -> int:
        place = (-1 if rows[index][2] is None else rows[index][2], index)
        same = [n for n, row in enumerate(rows) if kind(row) == kind(rows[index])]
        return sum((-1 if rows[n][2] is None else rows[n][2], n) < place for n in same)  # type: ignore[operator]

    return [
        (a, b)
        for a, first in enumerate(one)
        for b, second in enumerate(other)
        if kind(first) == kind(second) and rank(one, a) == rank(other, b)
    ]


def pairs_of(found: PairedRows) -> list[tuple[int, int]]:
    return list(zip(found.original.tolist(), found.tuned.tolist(), strict=True))


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["s0", "s1", "s2", "s3"]),
        st.sampled_from(["colours", "places"]),
        st.none() | st.integers(0, 4),
        st.sampled_from(["red", "blue", "top left"]),
    ),
    max_size=14,
)


@given(one=ROWS, other=ROWS, copied=st.booleans(), data=st.data())
@pytest.mark.parametrize("by", ["position", "word"])
def test_pairs_are_those_of_a_search(
    tmp_path_factory: pytest.TempPathFactory, one: list[Row], other: list[Row], copied: bool, data: Any, by: Any
) -> None:
    """Any rows, repeated places and words among them; or the same in another order with some missing."""
    if copied:
        other = data.draw(st.permutations(one))[data.draw(st.integers(0, 3)) :]
    texts = ({f"s{n}": f"{n}" for n in (0, 1, 2, 3)}, {f"s{n}": f"other {n}" for n in (3, 2, 1, 0)})
    folder = tmp_path_factory.mktemp("pair")
    stores = make(folder / "a", one, texts[0]), make(folder / "b", other, texts[1])  # type: ignore[arg-type]
    if by == "word" and not one + other:
        with pytest.raises(BadInputError, match="no row of either store has a word"):
            pair_rows(*stores, by)
        return
    found = pair_rows(*stores, by)
    assert pairs_of(found) == by_search(one, other, by)
    assert [found.samples[number] for number in found.sample] == [one[row][0] for row in found.original]
    for name, rows in (("original", one), ("tuned", other)):
        assert found.alone[name].rows == len(rows) - len(found)
    # The other way round the same rows belong together.
    back = pair_rows(stores[1], stores[0], by)
    assert sorted((b, a) for a, b in pairs_of(back)) == pairs_of(found)


@given(order=st.permutations(range(9)), left=st.sets(st.integers(0, 8)))
def test_the_order_of_rows_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], left: set[int]
) -> None:
    """The n-th "red" of an answer is the n-th by position, in whatever order rows stand; missing ones have no pair."""
    rows: list[Row] = [(f"s{s}", "colours", 3 * n, "red" if n != 1 else "blue") for s in range(3) for n in range(3)]
    shuffled = [rows[number] for number in order]
    texts = {f"s{n}": "read" for n in range(3)}
    folder = tmp_path_factory.mktemp("pair")
    kept = [row for number, row in enumerate(rows) if number not in left]
    stores = make(folder / "a", shuffled, texts), make(folder / "b", kept, texts)  # type: ignore[arg-type]
    found = pair_rows(*stores)
    assert found.by == "position"
    assert [shuffled[a] for a in found.original] == [kept[b] for b in found.tuned]
    assert len(found) == len(kept)
    assert np.all(np.diff(found.original) > 0)
    by_word = pair_rows(make(folder / "c", rows, texts), stores[0], "word")  # type: ignore[arg-type]
    assert [rows[a] for a in by_word.original] == [shuffled[b] for b in by_word.tuned] == rows


def test_auto(tmp_path: Path) -> None:
    """By position where the text is the same, else by word, else by sample; refused where nothing tells rows apart."""
    words: list[Row] = [("s0", "w", 5, "red"), ("s0", "w", 9, "red"), ("s1", "w", 5, "blue"), ("s1", "end", 7, None)]
    moved: list[Row] = [("s0", "w", 6, "red"), ("s1", "w", 4, "blue"), ("s1", "w", 8, "blue"), ("s1", "end", 9, None)]
    same, others = {"s0": "a", "s1": "b"}, {"s0": "a", "s1": "c"}
    original = make(tmp_path / "a", words, same)
    found = pair_rows(original, make(tmp_path / "b", words, same))
    assert (found.by, pairs_of(found), found.warnings) == ("position", [(n, n) for n in range(4)], ())
    found = pair_rows(original, make(tmp_path / "c", moved, others))
    assert (found.by, pairs_of(found)) == ("word", [(0, 0), (2, 1), (3, 3)])
    plain: list[Row] = [("s1", "end", 3, None), ("s0", "end", 3, None), ("s0", "mean", None, None)]
    found = pair_rows(make(tmp_path / "d", plain[::-1], same), make(tmp_path / "e", plain, others))
    assert (found.by, pairs_of(found)) == ("sample", [(0, 2), (1, 1), (2, 0)])
    many: list[Row] = [("s0", "image", n, None) for n in range(3)]
    stores = make(tmp_path / "f", many, same), make(tmp_path / "g", many, others)
    with pytest.raises(
        BadInputError,
        match=r"'image' has several rows for sample 's0' in the original store, and the models have read other texts "
        r"of 1 of 2 common samples: .*texts='original'.*by='position'",
    ):
        pair_rows(*stores)
    # Whoever knows that positions mean the same may say so, and is reminded.
    found = pair_rows(*stores, "position")
    assert pairs_of(found) == [(0, 0), (1, 1), (2, 2)]
    assert found.warnings == (
        "rows are paired by position, but the models have read other texts of 1 of 2 common samples",
    )
    mixed = make(tmp_path / "h", [*words, *many], same), make(tmp_path / "i", [*moved, *many], others)
    with pytest.raises(BadInputError, match="'image' has several rows without a word for sample 's0'"):
        pair_rows(*mixed)
    parts = [store.where(selector=["w", "end"]) for store in mixed]
    assert pairs_of(pair_rows(*parts)) == [(0, 0), (2, 1), (3, 3)]
    # A sample that is not in both may have what it likes.
    lone = make(tmp_path / "j", [*plain, *(("x", "image", n, None) for n in range(3))], {**same, "x": None})
    assert pair_rows(lone, make(tmp_path / "k", plain, others)).by == "sample"


def test_by_sample_pairs_whatever_word_was_said(tmp_path: Path) -> None:
    """The first colour of each answer, where the fine-tuned model says another: no partner by word, but by sample."""
    one: list[Row] = [("s0", "first", 5, "red"), ("s1", "first", 5, "blue")]
    other: list[Row] = [("s0", "first", 5, "blue"), ("s1", "first", 6, "blue")]
    stores = make(tmp_path / "a", one, {"s0": "a", "s1": "b"}), make(tmp_path / "b", other, {"s0": "c", "s1": "d"})
    assert pairs_of(pair_rows(*stores, "word")) == [(1, 1)]
    assert pairs_of(pair_rows(*stores, "sample")) == [(0, 0), (1, 1)]
    twice = make(tmp_path / "c", [*one, one[0]], {"s0": "a", "s1": "b"})
    with pytest.raises(BadInputError, match="'first' has several rows for sample 's0' in the tuned store"):
        pair_rows(stores[0], twice, "sample")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({}, {}, True),
        ({"answer_tokens": [1, 2]}, {"answer_tokens": [1, 2]}, True),
        ({"answer_tokens": [1, 2]}, {"answer_tokens": [1, 3]}, False),
        ({"answer_tokens": [1, 2]}, {"answer_tokens": None}, False),
        ({"prompt": "where ?"}, {}, False),
        ({"text": "read"}, {"text": None}, False),
        ({"image": "a.jpg"}, {"image": "b/a.jpg"}, True),
    ],
)
def test_the_same_text(one: dict[str, Any], other: dict[str, Any], same: bool, tmp_path: Path) -> None:
    """Prompt, text and tokens must be those of the other store; where pictures lie does not matter."""
    stores = [
        ActivationStore.from_arrays(
            tmp_path / name,
            {"h": np.ones((1, 2))},
            [{"sample": "x", "selector": "end", "position": 3}],
            [{"sample": "x", "prompt": "what ?", "text": None, **more}],
            {},
        )
        for name, more in (("a", one), ("b", other))
    ]
    assert pair_rows(*stores).by == ("position" if same else "sample")


def test_an_unknown_text_is_no_same_text(tmp_path: Path) -> None:
    """Stores that do not tell what was read, or begin answers in other ways, are not paired by position unasked."""
    bare = [
        ActivationStore.from_arrays(
            tmp_path / name, {"h": np.ones((1, 2))}, [{"sample": "x", "position": 3}], [{"sample": "x"}], {}
        )
        for name in "ab"
    ]
    assert pair_rows(*bare).by == "sample"
    assert "no column 'prompt', so which text was read is not known" in pair_rows(*bare, "position").warnings[0]
    rows: list[Row] = [("s0", "end", 3, None)]
    stores = [make(tmp_path / p, rows, {"s0": "a"}, answer_prefix=p) for p in ("in", "on")]
    found = pair_rows(*stores)
    assert (found.by, found.warnings) == ("sample", ("answer_prefix is 'in' in original and 'on' in tuned",))


def test_samples_of_one_store_only_are_counted(tmp_path: Path) -> None:
    """They and their rows are told, as are rows without a partner; no sample in common at all is refused."""
    one: list[Row] = [("s0", "w", 5, "red"), ("s0", "w", 6, "blue"), ("s1", "w", 5, "red"), ("s2", "w", 5, "red")]
    other: list[Row] = [("s2", "w", 5, "red"), ("s3", "w", 5, "red"), ("s0", "w", 5, "red")]
    stores = (
        make(tmp_path / "a", one, {"s0": "a", "s1": "a", "s2": "a", "empty": "a"}),
        make(tmp_path / "b", other, {"s2": "a", "s3": "a", "empty": "a", "s0": "a"}),
    )
    found = pair_rows(*stores)
    assert pairs_of(found) == [(0, 2), (3, 0)]
    assert (found.samples, found.sample.tolist()) == (("s0", "s2", "empty"), [0, 1])
    assert found.describe().split("\n") == [
        "2 pairs of rows by position, of 2 of 3 common samples",
        "original: 2 rows without a partner; 1 samples that tuned has not",
        "tuned: 1 rows without a partner; 1 samples that original has not",
    ]
    with pytest.raises(BadInputError, match=r"no sample in common .*\['x'\].*\['s2'\].* see extract_pair"):
        pair_rows(make(tmp_path / "c", [], {"x": "a"}), stores[1])
    with pytest.raises(BadInputError, match="by='rows'; it must be"):
        pair_rows(*stores, "rows")  # type: ignore[arg-type]


def test_what_makes_rows_incomparable_is_said(tmp_path: Path) -> None:
    """Hooks that one lacks, vectors of other lengths, another family, selectors described otherwise."""
    rows: list[Row] = [("s0", "end", 3, None)]
    end = {"selector": "BeforeSpecial", "pool": "last"}
    one = make(tmp_path / "a", rows, {"s0": "a"}, {"h": 2, "x": 2, "y": 3}, family="llava", selectors={"end": end})
    other = make(
        *(tmp_path / "b", rows, {"s0": "a"}, {"h": 2, "x": 3, "z": 3}),
        family="idefics2",
        selectors={"end": {**end, "pool": "mean"}, "more": end},
    )
    assert pair_rows(one, one).warnings == ()
    found = pair_rows(one, other)
    assert len(found) == 1
    for line, part in zip(
        found.describe().split("\n")[3:],
        (
            "warning: only original holds y",
            "warning: only tuned holds z",
            "warning: vectors at x have shape (2,) in original and (3,) in tuned",
            "warning: family is 'llava' in original and 'idefics2' in tuned",
            "warning: selector 'end' is {'pool': 'last'",
            "warning: selector 'more' is None in original and {'pool': 'last'",
        ),
        strict=True,
    ):
        assert line.replace("'selector': 'BeforeSpecial', ", "").startswith(part)


def dealt(pairs: PairedRows, shares: Sequence[float], seed: int) -> list[set[str]]:
    """Names of the samples in each part."""
    return [{pairs.samples[pairs.sample[pair]] for pair in part} for part in split_samples(pairs, shares, seed)]


@given(
    counts=st.lists(st.integers(0, 4), min_size=5, max_size=30),
    shares=st.sampled_from([(0.5, 0.5), (0.6, 0.2, 0.2), (0.25, 0.75), (1.0,)]),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_samples_are_dealt_whole(counts: list[int], shares: tuple[float, ...], seed: int, data: Any) -> None:
    """Every pair once, no sample in two parts, sizes by shares; the same for any order of samples and pairs."""

    def pairs(order: Sequence[int]) -> PairedRows:
        number = np.repeat(np.arange(len(order)), [counts[sample] for sample in order])
        rows = data.draw(st.permutations(range(len(number))))
        nothing = np.arange(len(number))
        return PairedRows("word", nothing, nothing, number[rows], tuple(f"s{sample}" for sample in order), {})

    made = pairs(range(len(counts)))
    filled = sum(count > 0 for count in counts)
    assume(filled >= 5)
    parts = split_samples(made, shares, seed)
    assert sorted(pair for part in parts for pair in part.tolist()) == list(range(len(made)))
    names = dealt(made, shares, seed)
    assert sum(map(len, names)) == len(set().union(*names)) == filled
    assert all(abs(len(part) - share * filled) <= 1 for part, share in zip(names, shares, strict=True))
    again = pairs(data.draw(st.permutations(range(len(counts)))))
    assert dealt(again, shares, seed) == names


def test_the_seed_deals(tmp_path: Path) -> None:
    """Other seeds deal otherwise; shares that make no whole, and parts that would be empty, are refused."""
    texts: dict[str, str | None] = {f"s{n}": "a" for n in range(20)}
    store = make(tmp_path / "a", [(name, "end", 3, None) for name in texts], texts)
    pairs = pair_rows(store, store)
    assert dealt(pairs, (0.5, 0.5), 0) == dealt(pairs, (0.5, 0.5), 0) != dealt(pairs, (0.5, 0.5), 1)
    for shares in ((0.5, 0.4), (1.5, -0.5), ()):
        with pytest.raises(BadInputError, match="must be positive and together 1"):
            split_samples(pairs, shares)
    with pytest.raises(BadInputError, match="20 samples have pairs, too few for 2 parts"):
        split_samples(pairs, (0.99, 0.01))
