"""Tables of a study: numbers counted by hand, empty cells for what there is no number for, strict JSON."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concept_dict.pca import PCA
from concept_dict.recovery import CONTROLS, FORMS, SCORES
from concept_dict.shift_study import ShiftStudy
from concept_dict.shift_tables import comparison_rows, concept_rows, form_rows, table, write_tables
from hooked_mm.errors import BadInputError
from tests.shifts import made_up, told, with_enough


@pytest.fixture(scope="module")
def study() -> ShiftStudy:
    """Of k-means with four concepts."""
    return made_up()[0]


@pytest.fixture(scope="module")
def known(study: ShiftStudy) -> ShiftStudy:
    """The same with scores that are easy to count with."""
    return with_enough(replace(study, recovery=told(study)), 20)


def _read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def _json(path: Path) -> Any:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def test_a_concept_by_hand(known: ShiftStudy) -> None:
    """Cosine from .1 to .5: .4 of the .9 that were missing. Distance from .1 to .5: worse by .4, four times .1."""
    row = concept_rows(known, ["red", "blue", "sea", "ring"])[0]
    assert (row["concept"], row["words"], row["rows"], row["held_out"], row["partner"]) == ("0", "red", 30, 20, "2")
    assert row["fate"] == known.fates.fate[2]
    found = [row[f"cosine_{name}"] for name in ("unshifted", "shifted", "gain", "relative_gain")]
    assert found == pytest.approx([0.1, 0.5, 0.4, 4 / 9])
    assert [row["distance_gain"], row["distance_relative_gain"]] == pytest.approx([-0.4, -4])
    assert row["magnitude"] == pytest.approx(float(known.shifts.vectors[0].double().norm()))
    assert [row["pairwise"], row["to_mean"]] == [float(known.shifts.pairwise[0]), float(known.shifts.to_mean[0])]
    last = concept_rows(known)[3]
    assert (last["partner"], last["fate"]) == (None, None)
    assert np.isnan(last["cosine_shifted"])
    assert "words" not in last


def test_forms_by_hand(known: ShiftStudy) -> None:
    """Concepts 0 and 1 count: 2 has 19 rows to be shifted by, 3 has no partner."""
    rows = {row["form"]: row for row in form_rows(known)}
    assert list(rows) == list(FORMS)
    assert {row["concepts"] for row in rows.values()} == {2}
    assert rows["unshifted"]["cosine"] == pytest.approx(0.15)
    assert rows["global"]["cosine"] == pytest.approx(0.16)
    assert rows["shifted"]["samples"] == pytest.approx(0.3)
    assert np.isnan(rows["refitted"]["explained"])
    assert form_rows(with_enough(known, 19))[5]["words"] == pytest.approx(1.1 / 3)


def test_comparisons_by_hand(known: ShiftStudy) -> None:
    """Against the global shift concept 0 gains .5 - .11, concept 1 loses .21 - .1; of distances the other way round."""
    rows = {(row["score"], row["against"]): row for row in comparison_rows(known)}
    assert list(rows) == [(score, against) for score in SCORES for against in CONTROLS]
    found = rows["words", "global"]
    assert (found["mean"], found["improved"], found["concepts"]) == (pytest.approx((0.39 - 0.11) / 2), 0.5, 2)
    # Of two concepts, drawn again: both the worse one, or both the better one, in a quarter of the draws each.
    assert (found["low"], found["high"]) == (pytest.approx(-0.11), pytest.approx(0.39))
    assert rows["distance", "global"]["mean"] == pytest.approx((0.11 - 0.39) / 2)


def test_files(known: ShiftStudy, tmp_path: Path) -> None:
    """CSV has the rows with empty cells; JSON has them with null, and settings, correlations, fates and counts."""
    out = write_tables(known, tmp_path / "new" / "tables", ["a,b", 'say "no"', "ü\n日本", "-"])
    assert sorted(path.name for path in out.iterdir()) == ["comparisons.csv", "concepts.csv", "forms.csv", "shift.json"]
    with (out / "concepts.csv").open(newline="", encoding="utf-8") as file:
        concepts = list(csv.DictReader(file))
    assert [row["words"] for row in concepts] == ["a,b", 'say "no"', "ü\n日本", "-"]
    assert float(concepts[0]["cosine_gain"]) == pytest.approx(0.4)
    assert (concepts[3]["partner"], concepts[3]["cosine_shifted"], concepts[3]["cosine_unshifted"]) == ("", "", "0.4")
    assert _read(out / "forms.csv")[-1]["explained"] == ""
    assert len(_read(out / "comparisons.csv")) == len(SCORES) * len(CONTROLS)
    (content,) = _json(out / "shift.json")
    assert content["study"] is None
    assert content["concepts"][3]["cosine_shifted"] is None
    assert (content["method"]["method"], content["settings"]["alpha"], content["settings"]["enough"]) == (
        "KMeans",
        1,
        20,
    )
    assert content["counts"]["with enough rows"] == 2
    assert set(content["correlations"]) == set(known.correlations)
    fates = content["fates"]
    assert sum(fates[fate] for fate in ("kept", "specialised", "new")) == len(fates["concepts"]) == 4


def test_several_studies(known: ShiftStudy, tmp_path: Path) -> None:
    """Rows of all under each other, told apart by a first column."""
    signed = made_up(PCA(2), words=False)[0]
    write_tables({"k=4": known, "PCA": signed}, tmp_path, {"k=4": ["a", "b", "c", "d"]})
    rows = _read(tmp_path / "concepts.csv")
    assert list(rows[0])[:3] == ["study", "concept", "words"]
    assert [(row["study"], row["concept"]) for row in rows[3:]] == [
        ("k=4", "3"),
        ("PCA", "0 +"),
        ("PCA", "1 +"),
        ("PCA", "0 −"),
        ("PCA", "1 −"),
    ]
    assert {(row["words"], row["words_shifted"]) for row in rows[4:]} == {("", "")}
    assert [one["study"] for one in _json(tmp_path / "shift.json")] == ["k=4", "PCA"]
    assert "words" not in {row["score"] for row in _read(tmp_path / "comparisons.csv") if row["study"] == "PCA"}


def test_refusals(known: ShiftStudy, tmp_path: Path) -> None:
    """Names that do not fit, and no study at all."""
    with pytest.raises(BadInputError, match="3 names for 4 concepts"):
        concept_rows(known, ["a", "b", "c"])
    with pytest.raises(BadInputError, match="no study"):
        write_tables({}, tmp_path)
    with pytest.raises(BadInputError, match="lists by its name"):
        write_tables({"one": known}, tmp_path, ["a", "b", "c", "d"])


def test_plain_text(known: ShiftStudy) -> None:
    """Forms in columns, a line per comparison, and a dash where there is no number."""
    lines = table(known).splitlines()
    assert lines[0].startswith("means over 2 of 4 concepts, those with 20 rows or more")
    assert lines[1].split() == list(SCORES)
    (refitted,) = [line for line in lines if line.startswith("refitted")]
    assert refitted.split() == ["refitted", "0.210", "0.210", "0.210", "0.210", "–", "–"]
    (line,) = [line for line in lines if line.split()[:2] == ["cosine", "global"]]
    assert line.endswith("+0.140 [-0.110, +0.390], better for 50%, worse for 50% of 2")
    assert "no concept has enough rows" in table(with_enough(known, 99))


def test_identical_models(tmp_path: Path) -> None:
    """Nothing moved: no shift is better than another, nothing is divided by 0, JSON has a number or null."""
    study, _ = made_up(same=True)
    assert {row["magnitude"] for row in concept_rows(study)} == {0.0}
    (content,) = _json(write_tables(study, tmp_path) / "shift.json")
    found = [row for row in content["comparisons"] if row["against"] != "unshifted"]
    assert {(row["mean"], row["low"], row["high"], row["improved"]) for row in found} == {(0, 0, 0, 0)}
    assert [row["pairwise"] for row in content["concepts"]] == [None] * 4
    assert content["correlations"]["magnitude with gain in cosine"]["pearson"] is None


def test_a_concept_without_rows(tmp_path: Path) -> None:
    """It is listed, has a row of empty cells, and does not count."""
    study, _ = made_up(empty=True)
    assert "without rows: concepts 0\n" in table(study)
    first = _read(write_tables(study, tmp_path) / "concepts.csv")[0]
    assert (first["rows"], first["partner"], first["cosine_shifted"]) == ("0", "", "")
    (content,) = _json(tmp_path / "shift.json")
    assert (content["empty"], content["counts"]["with enough rows"]) == (["0"], 3)
