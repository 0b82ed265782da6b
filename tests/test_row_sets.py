"""Sets of rows are those that conditions name, also where YAML reads words as something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hooked_mm.errors import BadInputError
from hooked_mm.store import ActivationStore
from steering.row_sets import part_of, partners, readable, row_sets

ANSWERS = ["yes", "no", "3", "red", "red", "blue", "on", "none"]


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """A row per answer, whose value is its number; two samples per picture."""
    samples = [
        {
            "sample": f"s{n}",
            "sample_number": n,
            "answer": answer,
            "picture": n // 2,
            "held_out": n % 2 == 0,
            "colours": ["red"] if n < 3 else ["red", "blue"],
        }
        for n, answer in enumerate(ANSWERS)
    ]
    rows = [{"sample": f"s{n}", "position": 7, "selector": "last"} for n in range(len(ANSWERS))]
    values = torch.arange(len(ANSWERS), dtype=torch.float32)[:, None].repeat(1, 2)
    return ActivationStore.from_arrays(tmp_path / "store", {"h": values}, rows, samples, {})


def numbers(found: Any) -> list[int]:
    """Which rows these are."""
    return found.activations("h")[:, 0].int().tolist()


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("{answer: yes}", [0, 6]),
        ("{answer: 'no'}", [1]),
        ("{answer: 3}", [2]),
        ("{answer: [3, red]}", [2, 3, 4]),
        ("{answer: none}", [7]),
        ("{answer: red, held_out: true}", [4]),
        ("{colours: blue}", [3, 4, 5, 6, 7]),
        ("{picture: 1}", [2, 3]),
        ("{selector: last, answer: blue}", [5]),
    ],
)
def test_conditions_as_yaml_gives_them(store: ActivationStore, condition: str, expected: list[int]) -> None:
    """An answer that YAML reads as a truth value or a number is the word; in columns of those, it is what it is."""
    where = yaml.safe_load(condition)
    assert numbers(part_of(store, where)) == expected
    source, target = row_sets(store, where)
    assert (numbers(source), target) == (expected, None)


def test_words_that_are_truth_values_are_named_as_words(store: ActivationStore) -> None:
    """In names and provenance stands what the column holds."""
    source, target = row_sets(store, {"answer": True, "held_out": True}, {"answer": False})
    assert target is not None
    assert (source.name, target.name) == ("yes or on, True", "no")
    assert target.describe() == {"where": {"answer": "no"}, "rows": 1, "samples": 1}
    assert readable(store, {"answer": [True, "red"]}) == {"answer": ["yes", "on", "red"]}


def test_all_and_random(store: ActivationStore) -> None:
    """As many random rows as the other set has, the same for a seed; all rows are all of the part."""
    source, target = row_sets(store, "random", {"answer": ["red", "blue"]}, seed=1)
    assert target is not None
    assert len(source) == len(target) == 3
    assert source.name == "random"
    assert numbers(row_sets(store, "random", {"answer": ["red", "blue"]}, seed=1)[0]) == numbers(source)
    drawn = {tuple(numbers(row_sets(store, "random", {"answer": "red"}, seed=seed)[0])) for seed in range(9)}
    assert len(drawn) > 3
    source, target = row_sets(store.where(held_out=True), "all", "random")
    assert numbers(source) == numbers(target) == [0, 2, 4, 6]
    assert len(source.places()) == 4


def test_partners(store: ActivationStore) -> None:
    """Rows of the same picture, each once; or any, by chance."""
    one, other = row_sets(store, {"held_out": True}, {"held_out": False})
    assert other is not None
    own, theirs = partners(one, other, "picture")
    assert [(numbers(one)[i], numbers(other)[j]) for i, j in zip(own, theirs, strict=True)] == [
        *((0, 1), (2, 3), (4, 5), (6, 7))
    ]
    own, theirs = partners(one, other, seed=3)
    assert sorted(own) == sorted(theirs) == [0, 1, 2, 3]
    assert partners(one, other, seed=3) == (own, theirs)
    few, _ = row_sets(store, {"answer": "red"})
    assert len(partners(few, other)[0]) == 2
    assert len(partners(few, other, "position")[0]) == 2
    with pytest.raises(BadInputError, match="no source row has the same 'sample'"):
        partners(one, other, "sample")
    with pytest.raises(BadInputError, match="no column 'pictures'; nearest: picture"):
        partners(one, other, "pictures")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({"answer": "redd"}, None, r"no row meets {'answer': 'redd'}; answer holds red \(2\)"),
        ({"anser": "red"}, None, "no column 'anser'; nearest: answer"),
        ({"picture": "first"}, None, "do not fit the columns' types"),
        ({"answer": "red"}, {"answer": ["red"]}, "are the same 2 rows"),
        ("all", "all", "are the same 8 rows"),
        ("random", "random", "as many rows as the other"),
        ("random", None, "as many rows as the other"),
        ("rest", None, "rows 'rest'; give conditions"),
    ],
)
def test_refusals(store: ActivationStore, source: Any, target: Any, message: str) -> None:
    """What is wrong, and what the columns hold."""
    with pytest.raises(BadInputError, match=message):
        row_sets(store, source, target)


def test_rows_of_several_selectors(tmp_path: Path) -> None:
    """One at a time, by a condition."""
    rows = [{"sample": "s0", "selector": name} for name in ("last", "word")]
    store = ActivationStore.from_arrays(
        tmp_path / "s", {"h": torch.zeros(2, 2)}, rows, [{"sample": "s0", "sample_number": 0}], {}
    )
    with pytest.raises(BadInputError, match=r"selectors last, word.*selector: last"):
        row_sets(store, "all")
    assert len(row_sets(store.where(selector="last"), "all")[0]) == 1
    with pytest.raises(BadInputError, match="no rows left"):
        row_sets(store.where(selector="other"), "all")
