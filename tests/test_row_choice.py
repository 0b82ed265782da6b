"""Which rows a dictionary is of: kept with it, and said in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from concept_dict.row_choice import described, learnt_where, selectors_of
from hooked_mm.store import ActivationStore


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """Six rows of two samples by two selectors."""
    rows = [
        {"sample": f"s{n // 3}", "selector": ("last", "word")[n % 2], "word": ("red", "blue")[n % 2]} for n in range(6)
    ]
    samples = [{"sample": f"s{n}", "sample_number": n} for n in range(2)]
    return ActivationStore.from_arrays(tmp_path / "s", {"h": torch.zeros(6, 2)}, rows, samples, {})


def test_what_is_kept() -> None:
    """A copy of the conditions; none where there are none."""
    made_by: dict[str, Any] = {"model": "m", "where": {"word": ["red"]}}
    assert learnt_where(made_by) == {"word": ["red"]}
    assert learnt_where({"model": "m"}) == learnt_where({"where": None}) == {}


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({}, "all (of the selectors last, word)"),
        ({"selector": "last"}, "those whose selector is last"),
        ({"selector": ["last", "word"]}, "those whose selector is last or word (of the selectors last, word)"),
        ({"selector": "word", "word": "blue"}, "those whose selector is word; word is blue"),
    ],
)
def test_the_sentence(store: ActivationStore, where: dict[str, Any], said: str) -> None:
    """Conditions by name; that rows of several selectors are mixed."""
    assert described(where, store.where(**where)) == said


def test_selectors(store: ActivationStore) -> None:
    """Those of the rows that are there; rows without a name have none."""
    assert selectors_of(store) == ["last", "word"]
    assert selectors_of(store.where(word="red")) == ["last"]


def test_rows_without_selectors(tmp_path: Path) -> None:
    """A store from elsewhere."""
    bare = ActivationStore.from_arrays(
        tmp_path / "s", {"h": torch.zeros(1, 2)}, [{"sample": "a"}], [{"sample": "a"}], {}
    )
    assert selectors_of(bare) == []
    assert described({}, bare) == "all"
