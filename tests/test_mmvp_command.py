"""The command for MMVP: its table is what was said, its scores are counts of it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from analyses.mmvp_command import main, scores
from analyses.mmvp_protocol import Graded, Question
from analyses.result import Result
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.pairs import scene_pair
from tests.mmvp_files import write_mmvp


def scenes(folder: Path, pairs: int) -> Path:
    """Pairs of scenes as MMVP has its pictures: two colours, one question."""
    made = [scene_pair("test", number, "colour") for number in range(pairs)]
    rows: dict[int, tuple[str, str, str]] = {}
    for number, pair in enumerate(made):
        offered = f"(a) {pair.answers[0]} (b) {pair.answers[1]}"
        rows |= {2 * number + 1: (pair.question, offered, "(a)"), 2 * number + 2: (pair.question, offered, "(b)")}
    write_mmvp(folder, rows, pictures=False)
    for number, pair in enumerate(made):
        for place, scene in enumerate((pair.one, pair.other), start=1):
            picture(scene).save(folder / "MMVP Images" / f"{2 * number + place}.jpg", quality=95)
    return folder


@pytest.mark.usefixtures("loaded")
def test_the_command_asks_and_counts(llava: HookedMM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The small LLaVA on scenes in MMVP's format; what it says is what it generates without any options."""
    folder = scenes(tmp_path / "mmvp", 6)
    given = ["--model.id", "small:llava", "--data.folder", str(folder), "--draws", "50", "--ask", "question"]
    main([*given, "--grade", "options", "--output", str(tmp_path / "out")])
    with open(tmp_path / "out" / "answers.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(1, 13))
    for row in rows[:4]:
        assert row["said"] == max("ab", key=lambda letter: float(row[f"log p {letter}"]))
        assert row["right"] == str(int(row["said"] == row["answer"]))
    result = Result.load(tmp_path / "out")
    both = sum(a["right"] == b["right"] == "1" for a, b in zip(rows[::2], rows[1::2], strict=True))
    right = sum(row["right"] == "1" for row in rows)
    by = {score.score: score for score in result.scores}
    assert by["pairs right"].value == pytest.approx(both / 6)
    assert by["answers right"].value == pytest.approx(right / 12)
    assert both > 3
    assert f"right: {both} of 6 pairs, {right} of 12 answers" in result.notes
    main([*given, "--grade", "parsed", "--max_new_tokens", "2", "--output", str(tmp_path / "said")])
    with open(tmp_path / "said" / "answers.csv", newline="", encoding="utf-8") as file:
        said = list(csv.DictReader(file))
    assert sum(a["said"] == b["said"] for a, b in zip(rows, said, strict=True)) >= 10
    first = llava.generate(llava.prepare(folder / "MMVP Images" / "1.jpg", rows[0]["question"]), 2).text[0]
    assert said[0]["text"] == first
    assert "answers right" in capsys.readouterr().out
    with pytest.raises(BadInputError, match="grade='options'"):
        main([*given, "--output", str(tmp_path / "letters")])


def test_scores_count_what_was_not_parsed_and_what_was_left_out() -> None:
    """By hand."""
    options = {"a": "Yes", "b": "No"}
    said = {1: "a", 2: "b", 3: "a", 4: None, 5: "a"}
    graded = [
        Graded(Question(n, (n + 1) // 2, "?", "", options, "ab"[1 - n % 2], None), letter, {})
        for n, letter in said.items()
    ]
    found, notes = scores(graded, 50, 0)
    values = {one.score: one.value for one in found}
    assert values == {
        "pairs right": 0.5,
        "answers right": 0.75,
        "same letter for both": 0.0,
        "first letter of the alphabet": pytest.approx(0.6),
    }
    assert found[0].left_out == 1
    assert "1 of 5 answers give no letter, and count as wrong" in notes
    assert any("1 questions count for nothing" in note for note in notes)
