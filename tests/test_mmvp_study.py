"""The study of MMVP on a few pairs of scenes: its files are MMVP's, its table and gallery are made."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analyses.mmvp_protocol import questions_of
from benchmarks.mmvp_study import coarse, coarseness, main, write_scenes
from hooked_mm.datasets.mmvp import Mmvp
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.pairs import ATTRIBUTES, scene_pair


def test_scenes_are_written_in_mmvps_format(tmp_path: Path) -> None:
    """One question, two pictures, two answers; either option may be the first picture's."""
    questions = questions_of(Mmvp(write_scenes(tmp_path, 7)))
    assert [question.pair for question in questions] == [n // 2 + 1 for n in range(14)]
    first = set()
    for number in range(7):
        pair = scene_pair("test", number, list(ATTRIBUTES)[number % 6])
        for place, (question, words, scene) in enumerate(
            zip(questions[2 * number : 2 * number + 2], pair.answers, (pair.one, pair.other), strict=True)
        ):
            assert question.text == pair.question
            assert question.options[question.answer] == words
            drawn = np.asarray(coarse(picture(scene), coarseness(number + 1)), dtype=float)
            shown = np.asarray(Image.open(str(question.images)), dtype=float)
            assert np.abs(drawn - shown).mean() < 3
            if not place:
                first.add(question.answer)
    assert first == {"a", "b"}
    assert [coarseness(pair) for pair in (1, 6, 7, 13, 19, 25)] == [1, 1, 4, 8, 16, 1]


@pytest.mark.usefixtures("loaded")
def test_the_study_writes_its_table_and_its_gallery(tmp_path: Path) -> None:
    """Clear pictures, which the small LLaVA answers by what it sees."""
    given = ["--pairs", "6", "--models", "small:llava", "--draws", "5", "--batch_size", "12"]
    main([*given, "--work", str(tmp_path / "work"), "--output", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    assert "6 pairs of scenes in MMVP's format, not MMVP" in text
    rows = dict(line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ") and " | " in line[2:-2])
    assert rows["right, its own picture"] == "6 of 6 pairs, 12 of 12 answers"
    assert rows["right, the pair's other picture"] == "0 of 6 pairs, 0 of 12 answers"
    assert rows["driven by image"] == "12 of 12"
    with open(tmp_path / "work" / "small_llava" / "answers.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["index"] for row in table] == [str(number) for number in range(1, 13)]
    assert {row["driven by"] for row in table} == {"image"}
    assert all(row["own"] == row["answer"] != row["other"] for row in table)
    page = (tmp_path / "work" / "small_llava" / "gallery.html").read_text()
    assert page.count("relevancy, log ratio, own") == 6
