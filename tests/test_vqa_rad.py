"""VQA-RAD, from a file written as the official one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hooked_mm.data import Sample
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.vqa_rad import VqaRad
from hooked_mm.errors import BadInputError
from tests.official import dump, slake, vqa_rad


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return dump(tmp_path / "VQA_RAD Dataset Public.json", vqa_rad())


def test_questions_with_what_is_known_of_them(file: Path) -> None:
    """Counts become text; white space around values goes."""
    data = VqaRad(file, "images")
    samples = [data.dataset[n] for n in range(4)]
    assert [sample.answer for sample in samples] == ["Yes", "Yes", "3", "5.6cm"]
    assert samples[1] == Sample(
        "vqa-rad-1",
        Path("images/synpic54610.jpg"),
        "Is there evidence of infarction?",
        "Yes",
        {
            "question": "Is there evidence of infarction?",
            "qid": "1",
            "split": "train",
            "question_type": "PRES",
            "answer_type": "CLOSED",
            "phrase_type": "para",
            "image_organ": "HEAD",
            "image_name": "synpic54610.jpg",
        },
    )
    assert samples[3].columns["image_organ"] == "CHEST"


def test_splits_and_filters(file: Path) -> None:
    """The phrases marked so are the test split; ids stay."""
    test = VqaRad(file, "x", split="test")
    assert test.ids() == ["vqa-rad-2", "vqa-rad-3"]
    assert [test.dataset[n].columns["split"] for n in range(2)] == ["test", "test"]
    assert VqaRad(file, "x", split="train").ids() == ["vqa-rad-0", "vqa-rad-1"]
    assert VqaRad(file, "x", where=Selection(equal={"answer_type": "CLOSED"})).ids() == ["vqa-rad-0", "vqa-rad-1"]
    assert VqaRad(file, "x", where=Selection(equal={"image_organ": ["ABD", "CHEST"]}, limit=1)).ids() == ["vqa-rad-2"]


ITEMS = vqa_rad()


@pytest.mark.parametrize(
    ("content", "options", "parts"),
    [
        ([{**ITEMS[0], "phrase_type": "free"}], {}, ["question 0 has phrase_type='free'", "test_para"]),
        ([ITEMS[0], {k: v for k, v in ITEMS[1].items() if k != "qid"}], {}, ["entry 1 has no 'qid'"]),
        ([ITEMS[0], {**ITEMS[1], "answer": None}], {}, ["entry 1 has answer=None (NoneType)", "str or int or float"]),
        ([ITEMS[0], ITEMS[0]], {}, ["two entries that are 'vqa-rad-0'"]),
        (ITEMS, {"split": "val"}, ["no split 'val'", "train, test"]),
        (ITEMS[:2], {"split": "test"}, ["no question of split 'test'"]),
        (slake(), {}, ["is not VQA-RAD", "looks like SLAKE"]),
        ([], {}, ["is not VQA-RAD", "an empty list"]),
    ],
)
def test_refusals_name_file_value_and_remedy(tmp_path: Path, content: Any, options: dict, parts: list[str]) -> None:
    """Whatever is wrong with the file or does not fit it."""
    with pytest.raises(BadInputError) as error:
        VqaRad(dump(tmp_path / "file.json", content), "x", **options)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_the_manifest_says_what_decides_the_content(file: Path) -> None:
    """A split is other data than all."""
    assert VqaRad(file, "x").describe() == VqaRad(file, "x").describe()
    assert VqaRad(file, "x").describe() != VqaRad(file, "x", split="test").describe()
