"""SLAKE, from a file written as the official one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hooked_mm.data import Sample
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.slake import Slake
from hooked_mm.errors import BadInputError
from tests.official import dump, slake, vqa_rad


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return dump(tmp_path / "train.json", slake())


def test_questions_with_what_is_known_of_them(file: Path) -> None:
    """Both languages, pictures in folders of their own."""
    data = Slake(file, "imgs")
    assert data.dataset[1].answer == "肝脏"
    assert data.dataset[2] == Sample(
        "slake-2",
        Path("imgs/xmlab102/source.jpg"),
        "Does the picture contain liver?",
        "No",
        {
            "question": "Does the picture contain liver?",
            "qid": 2,
            "img_id": 102,
            "img_name": "xmlab102/source.jpg",
            "q_lang": "en",
            "location": "Lung",
            "modality": "CT",
            "answer_type": "CLOSED",
            "content_type": "Organ",
        },
    )


def test_languages_and_filters(file: Path) -> None:
    """Ids are those of the whole file."""
    assert Slake(file, "x", language="en").ids() == ["slake-0", "slake-2"]
    assert Slake(file, "x", language="zh").ids() == ["slake-1"]
    assert Slake(file, "x", language="en", where=Selection(equal={"modality": "CT"})).ids() == ["slake-2"]


ITEMS = slake()


@pytest.mark.parametrize(
    ("content", "options", "parts"),
    [
        (ITEMS, {"language": "de"}, ["no language in", "'de'", "en, zh"]),
        ([ITEMS[0], {**ITEMS[1], "qid": "1"}], {}, ["entry 1 has qid='1' (str), which must be int"]),
        ([ITEMS[0], {k: v for k, v in ITEMS[1].items() if k != "answer"}], {}, ["entry 1 has no 'answer'"]),
        ([ITEMS[0], ITEMS[0]], {}, ["two entries that are 'slake-0'"]),
        (vqa_rad(), {}, ["is not SLAKE", "looks like VQA-RAD"]),
    ],
)
def test_refusals_name_file_value_and_remedy(tmp_path: Path, content: Any, options: dict, parts: list[str]) -> None:
    """Whatever is wrong with the file or does not fit it."""
    with pytest.raises(BadInputError) as error:
        Slake(dump(tmp_path / "file.json", content), "x", **options)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_the_manifest_says_what_decides_the_content(file: Path) -> None:
    """A language is other data than all."""
    assert Slake(file, "x").describe() == Slake(file, "x").describe()
    assert Slake(file, "x").describe() != Slake(file, "x", language="en").describe()
