"""Labels of rows: their words, what is true of their samples, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analyses.layers import Layers
from analyses.row_labels import row_labels
from hooked_mm.errors import BadInputError
from tests.layered import layered_store

COLUMNS = [
    {"place": "snow", "facts": ["colour=red", "place=snow"], "colour": ["red"], "count": 2, "size": 0.5},
    {"place": "sea", "facts": ["place=sea"], "colour": ["red", "blue"], "count": 1, "size": 0.25},
    {"place": None, "facts": [], "colour": [], "count": 2, "size": None},
]


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    """Five rows of three samples."""
    words = ["a", None, "b", "a", "b"]
    store = layered_store(tmp_path / "s", {1: torch.ones(5, 2)}, [0, 0, 1, 2, 2], None, words, COLUMNS)
    return Layers.of_store(store)


@pytest.mark.parametrize(
    ("label", "fact", "names", "numbers"),
    [
        ("word", None, ["a", "b"], [0, -1, 1, 0, 1]),
        ("place", None, ["sea", "snow"], [1, 1, 0, -1, -1]),
        ("count", None, ["1", "2"], [1, 1, 0, 1, 1]),
        ("colour", None, ["red"], [0, 0, -1, -1, -1]),
        ("facts", "colour=red", ["no", "yes"], [1, 1, 0, 0, 0]),
    ],
)
def test_labels(layers: Layers, label: str, fact: str | None, names: list[str], numbers: list[int]) -> None:
    """Of rows and of their samples; a list's only item; a fact is in a list or not; nothing known is no label."""
    found = row_labels(layers, label, fact)
    assert (found.names, found.numbers.tolist()) == (names, numbers)


@pytest.mark.parametrize(
    ("label", "fact", "message"),
    [
        ("plaice", None, "no column 'plaice'; nearest: place"),
        ("word", "colour=red", "but label is a row's word"),
        ("place", "snow", "'place' is no column of lists, it says 'snow'"),
        ("size", None, r"'size' says 0\.5, and a probe tells kinds"),
        ("facts", "colour=pink", r"no sample has 'colour=pink' in 'facts'.*there are: \['colour=red', 'place=sea'"),
    ],
)
def test_what_is_refused(layers: Layers, label: str, fact: str | None, message: str) -> None:
    """With what there is."""
    with pytest.raises(BadInputError, match=message):
        row_labels(layers, label, fact)
