"""Where pairs of pictures come from: scenes, MMVP's files, one's own; one source at a time."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from analyses.frame import new_parser
from analyses.pair_batches import PairBatches
from analyses.pair_options import add_pairs, pairs_of, refuse_none, rounded, settings_of
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM


@pytest.fixture
def parser() -> ArgumentParser:
    """With the options of pairs."""
    made = new_parser("patching", "")
    add_pairs(made)
    return made


def options(parser: ArgumentParser, *given: str) -> Any:
    """As they are typed."""
    return parser.parse_args(["--model.id", "small:llava", "--output", "x", *given])


def test_each_source_gives_its_pairs(parser: ArgumentParser, tmp_path: Path) -> None:
    """Scenes of an attribute; the pairs of MMVP's files, those with equal labels counted; two pictures."""
    pairs, notes = pairs_of(options(parser, "--attribute", "shape", "--size", "2", "--objects", "1"))
    assert [pair.id for pair in pairs] == ["test-0-shape-0000", "test-0-shape-0001"]
    assert not notes
    folder = tmp_path / "MMVP Images"
    folder.mkdir()
    rows = [["lndex", "Question", "Options", "Correct Answer"]]
    for number, answer in enumerate(("(a)", "(b)", "(a)", "(a)"), start=1):
        Image.new("RGB", (6, 6), (number, 0, 0)).save(folder / f"{number}.jpg")
        rows.append([str(number), "Is it, so?", "(a) Yes (b) No", answer])
    with open(tmp_path / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    pairs, notes = pairs_of(options(parser, "--mmvp", str(tmp_path)))
    assert [(pair.id, pair.question, pair.answers) for pair in pairs] == [
        ("mmvp-1", "Is it, so? (a) Yes (b) No", ("(a)", "(b)"))
    ]
    assert notes == ["1 pairs of MMVP were left out: both answers are the same"]
    two = ["--clean", str(folder / "1.jpg"), "--corrupt", str(folder / "2.jpg"), "--question", "is it ?"]
    given = options(parser, *two, "--clean_answer", "yes", "--corrupt_answer", "no")
    (pair,), _ = pairs_of(given)
    assert (pair.question, pair.answers, pair.clean.size) == ("is it ?", ("yes", "no"), (6, 6))  # type: ignore[union-attr]
    assert settings_of(given)["clean"] == str(folder / "1.jpg")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give one of --attribute"),
        (["--attribute", "size", "--mmvp", "x"], "give one of --attribute"),
        (["--question", "is it ?"], "needs --clean, --corrupt, --clean_answer, --corrupt_answer, too"),
        (["--clean", "a", "--corrupt", "b", "--question", "c", "--clean_answer", "a"], "needs --corrupt_answer, too"),
    ],
)
def test_one_whole_source_is_needed(parser: ArgumentParser, given: list[str], message: str) -> None:
    """Neither none nor two, nor half of one."""
    with pytest.raises(BadInputError, match=message):
        pairs_of(options(parser, *given))


def test_a_run_without_pairs_says_why(llava: HookedMM) -> None:
    """And small differences in half precision are warned of."""
    batches = PairBatches(llava, [])
    batches.left_out["they are alike"] = ["one"]
    with pytest.raises(BadInputError, match=r"no pair is left \(1 pairs were left out: they are alike \(one\)\)"):
        refuse_none(0, batches, [])
    refuse_none(1, batches, [])
    assert rounded(llava) == []
    assert "--model.dtype float32" in rounded(SimpleNamespace(dtype=torch.bfloat16))[0]  # type: ignore[arg-type]
