"""A sweep on disk: what is read back is what was written, in JSON and in CSV; what is no sweep is refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from steering.sweep_result import SweepResult, further_scores, number, plain, steered, unsteered, write_rows
from tests.sweeps import made_up, row


def _strict(path: Path) -> Any:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def test_round_trip(tmp_path: Path) -> None:
    """All of it comes back; NaN as None, in strict JSON; nothing else lies in the folder."""
    made = made_up(damage=False)
    made.rows[0]["picture"] = "made of “ü”, \n\r and ,"
    found = SweepResult.load(made.save(tmp_path / "a" / "sweep"))
    assert (found.task, found.facts, found.examples) == (made.task, made.facts, made.examples)
    expected = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in one.items()} for one in made.rows]
    assert found.rows == expected
    assert {row["damage"] for row in _strict(tmp_path / "a/sweep/sweep.json")["rows"]} == {None}
    assert sorted(file.name for file in (tmp_path / "a/sweep").iterdir()) == ["settings.csv", "sweep.json"]
    with (tmp_path / "a/sweep/settings.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [one["damage"] for one in read] == [""] * len(made.rows)
    assert [float(one["effect"]) for one in read] == [one["effect"] for one in made.rows]
    assert read[0]["picture"] == made.rows[0]["picture"]


@given(
    st.lists(
        st.fixed_dictionaries(
            {"a": st.floats(), "b": st.text(st.characters(codec="utf-8", exclude_characters="\0")), "c": st.integers()},
            optional={"d": st.booleans()},
        ),
        min_size=1,
        max_size=5,
    )
)
def test_csv_keeps_every_value(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    """Numbers to the last digit, any text; an empty cell for what is no number or not there."""
    path = write_rows(rows, tmp_path_factory.mktemp("csv") / "rows.csv")
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for found, one in zip(read, rows, strict=True):
        assert found["a"] == ("" if not math.isfinite(one["a"]) else str(one["a"]))
        assert (found["b"], found["c"], found.get("d", "")) == (one["b"], str(one["c"]), str(one.get("d", "")))


def test_numbers_of_numpy_are_numbers() -> None:
    """Not text, as a JSON writer with a default would have it."""
    found = plain({"a": np.float32(0.5), "b": (np.int64(3), np.bool_(True)), "c": np.array([1.0, np.nan]), 4: np.inf})
    assert found == {"a": 0.5, "b": [3, True], "c": [1.0, None], "4": None}
    assert json.loads(json.dumps(found)) == found


def test_rows_by_what_they_are() -> None:
    """Settings, controls and the model as it is; a missing score is NaN."""
    rows = made_up().of("test")
    assert (len(steered(rows)), len(steered(rows, control=True)), sum(map(unsteered, rows))) == (64, 128, 1)
    assert len(rows) == 193
    assert math.isnan(number(rows[0], "CIDEr"))
    assert math.isnan(number({"kl": None}, "kl"))
    assert number({"kl": 2}, "kl") == 2.0


def test_further_scores() -> None:
    """Numbers under other names: no text, no flags, no bounds of an interval, none that is NaN throughout."""
    nothing = {"note": "x", "kept": True, "gone": math.nan, "none": None}
    one = row(1, "test", "v", 2, 1.0, kl=0.1, kl_low=0.0, kl_high=0.2, perplexity=np.float32(3), **nothing)
    assert further_scores([one]) == ["kl", "perplexity"]
    # What ends like a bound, of nothing that there is, is a score.
    assert further_scores([row(1, "test", "v", 2, 1.0, share_low=0.5)]) == ["share_low"]


def test_goal() -> None:
    """NaN where nothing was asked for."""
    assert [made_up().goal(score) for score in ("effect", "damage")] == [0.9, 0.02]
    assert math.isnan(SweepResult({}).goal("effect"))
    assert math.isnan(SweepResult({"goal": {"effect": 0.9}}).goal("damage"))


def test_refusals(tmp_path: Path) -> None:
    """Rows that can't be told apart, unknown splits, and folders without a sweep."""
    good = row(1, "test", "v", 2, 1.0)
    with pytest.raises(BadInputError, match="row 1 of the sweep has no hook, alpha"):
        SweepResult({}, [], [good, {k: v for k, v in good.items() if k not in ("hook", "alpha")}])
    with pytest.raises(BadInputError, match="'tset'; nearest: test"):
        SweepResult({}, [], [good | {"split": "tset"}])
    with pytest.raises(BadInputError, match="no split in this sweep 'validation'"):
        SweepResult({}, [], [good]).of("validation")
    with pytest.raises(BadInputError, match=r"there is no sweep\.json"):
        SweepResult.load(tmp_path)
    for content, reason in (('{"format": 2}', "has format 2"), ('{"format": 1, "facts": []}', "is no sweep")):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(BadInputError, match=reason):
            SweepResult.load(tmp_path)
