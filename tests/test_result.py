"""Results of analyses: nothing is lost between writing and reading, plots and TensorBoard show them, models compare."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from analyses.result import RESULT, Result, Score, compare, in_order, touching
from hooked_mm.errors import BadInputError

RESULT_A = Result(
    "linearity",
    "base",
    [
        *(Score("linearity", "image", layer, 0.5 + 0.1 * layer, 0.4, 0.9, 10, 2, 1) for layer in (1, 0)),
        Score("linearity", "text", 0, 0.7, rows=3),
        Score("linearity", "text", 1, math.nan),
        Score("words: red/blue", "all", None, 0.25),
    ],
    {"draws": 7},
    ["one row was left out"],
)


def test_nothing_is_lost(tmp_path: Path) -> None:
    """What is read is what was written, NaN where nothing is known; JSON stays valid JSON."""
    RESULT_A.write(tmp_path / "out")
    found = Result.load(tmp_path / "out")
    assert str(found) == str(RESULT_A)
    assert "NaN" not in (tmp_path / "out" / RESULT).read_text()
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert rows[1]["analysis"] == "linearity"
    assert [
        rows[0][name] for name in ("model", "modality", "layer", "value", "low", "rows", "samples", "left_out")
    ] == [
        "base",
        "image",
        "1",
        "0.6",
        "0.4",
        "10",
        "2",
        "1",
    ]
    assert rows[3]["value"] == ""


def test_a_plot_for_every_curve(tmp_path: Path) -> None:
    """A score at several layers is drawn, a single number is not."""
    RESULT_A.write(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == ["linearity.png"]
    with Image.open(tmp_path / "linearity.png") as picture:
        assert picture.width > 500
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 5)) for event in events.Scalars("linearity/image")] == [(0, 0.5), (1, 0.6)]
    assert events.Tags()["images"] == ["linearity"]


def test_the_table_has_layers_in_order() -> None:
    """A column per modality, what is not known as a dash, notes below."""
    assert RESULT_A.table().splitlines() == [
        "linearity",
        "layer           image  text",
        "0      0.5 [0.4, 0.9]   0.7",
        "1      0.6 [0.4, 0.9]     -",
        "",
        "words: red/blue",
        "layer   all",
        "       0.25",
        "",
        "one row was left out",
    ]


def test_scores_come_in_one_order() -> None:
    """By name and modality as they are given, then by layer, whoever found them."""
    given = (("b", "text", 1), ("a", "image", 2), ("c", "text", 0), ("a", "text", 0), ("a", "image", 1))
    found = in_order([Score(name, modality, layer, 0.0) for name, modality, layer in given], "ab", ["image", "text"])
    assert [(one.score, one.modality, one.layer) for one in found] == [
        ("a", "image", 1),
        ("a", "image", 2),
        ("a", "text", 0),
        ("b", "text", 1),
    ]


def test_models_side_by_side(tmp_path: Path) -> None:
    """One plot per score, one table of all; what does not compare is refused."""
    other = replace(RESULT_A, model="tuned")
    assert [path.name for path in compare([RESULT_A, other], tmp_path)] == ["linearity.png"]
    with open(tmp_path / "scores.csv", newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["base"] * 5 + ["tuned"] * 5
    for wrong in ([RESULT_A], [RESULT_A, RESULT_A], [RESULT_A, replace(other, analysis="anisotropy")]):
        with pytest.raises(BadInputError, match="compare two or more results of one analysis"):
            compare(wrong, tmp_path)


def test_bands_that_touch() -> None:
    """At an end, or one inside the other; without a band nothing is told apart."""
    here = Score("s", "all", 0, 0.5, 0.4, 0.6)
    assert touching(here, replace(here, low=0.6, high=0.8))
    assert touching(here, replace(here, low=0.45, high=0.5))
    assert not touching(here, replace(here, low=0.61, high=0.8))
    assert not touching(replace(here, low=0.61, high=0.8), here)
    assert touching(here, Score("s", "all", 0, 9.0))


@pytest.mark.parametrize("text", ["", "[]", '{"analysis": "x"}', json.dumps({"analysis": 1, "scores": [{"odd": 1}]})])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    """Named, with what to do."""
    with pytest.raises(BadInputError, match=r"holds no result\.json"):
        Result.load(tmp_path)
    (tmp_path / RESULT).write_text(text)
    with pytest.raises(BadInputError, match="is not an analysis's result"):
        Result.load(tmp_path)
