"""MMVP, from a file written as the official one is."""

from __future__ import annotations

from pathlib import Path

import pytest

from hooked_mm.data import Sample
from hooked_mm.datasets.mmvp import Mmvp
from hooked_mm.datasets.selection import Selection
from hooked_mm.errors import BadInputError
from tests.official import MMVP


def written(folder: Path, text: str = MMVP) -> Path:
    """The benchmark's folder with its table."""
    (folder / "Questions.csv").write_text(text, encoding="utf-8")
    return folder


def test_questions_with_their_pairs(tmp_path: Path) -> None:
    """Consecutive questions are a pair; options follow the question; commas and quotes of the CSV are undone."""
    data = Mmvp(written(tmp_path), template="llava-choice")
    assert data.ids() == ["mmvp-1", "mmvp-2", "mmvp-3", "mmvp-4"]
    samples = [data.dataset[n] for n in range(4)]
    assert [(s.columns["pair"], s.answer) for s in samples] == [(1, "(a)"), (1, "(b)"), (2, "(b)"), (2, "(a)")]
    asked = 'In the picture, is the key "Z" pressed? (a) Yes (b) No'
    assert samples[2] == Sample(
        "mmvp-3",
        tmp_path / "MMVP Images" / "3.jpg",
        f"{asked}\nAnswer with the option's letter from the given choices directly.",
        "(b)",
        {"index": 3, "pair": 2, "options": "(a) Yes (b) No", "question": asked},
    )


@pytest.mark.parametrize("name", ["Index", "lndex"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_column_of_ids_may_begin_with_a_small_l(tmp_path: Path, name: str, mark: str) -> None:
    """As in the published table; also with a byte order mark and Windows' line ends."""
    text = mark + MMVP.replace("Index", name, 1).replace("\n", "\r\n")
    (tmp_path / "Questions.csv").write_bytes(text.encode())
    data = Mmvp(tmp_path)
    assert [data.dataset[number] for number in range(4)] == [
        Mmvp(written(tmp_path)).dataset[number] for number in range(4)
    ]


def test_pairs_go_by_number_not_by_the_order_of_names(tmp_path: Path) -> None:
    """In a listing 10.jpg comes before 9.jpg, and 100.jpg before 99.jpg; rows may come in any order."""
    numbers = [10, 100, 9, 99]
    rows = [f"{number},Is it?,(a) Yes (b) No,({'ab'[number % 2]})\n" for number in numbers]
    data = Mmvp(written(tmp_path, "lndex,Question,Options,Correct Answer\n" + "".join(rows)))
    samples = [data.dataset[place] for place in range(4)]
    assert [Path(str(sample.images)).name for sample in samples] == ["10.jpg", "100.jpg", "9.jpg", "99.jpg"]
    assert [sample.columns["pair"] for sample in samples] == [5, 50, 5, 50]


def test_filters(tmp_path: Path) -> None:
    """A pair can be chosen; ids and pairs do not change by it."""
    data = Mmvp(written(tmp_path), where=Selection(equal={"pair": 2}))
    assert data.ids() == ["mmvp-3", "mmvp-4"]
    assert Mmvp(tmp_path, where=Selection(words=["butterfly's"], within="question")).ids() == ["mmvp-1", "mmvp-2"]


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    """Spreadsheets write one."""
    assert Mmvp(written(tmp_path, "\ufeff" + MMVP)).ids()[0] == "mmvp-1"


LINES = MMVP.splitlines(keepends=True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("".join(LINES[:4]), ["only one of the questions 3 and 4"]),
        (MMVP + LINES[1] + LINES[2], ["two entries that are 'mmvp-1'"]),
        (MMVP.replace("Correct Answer", "Answer"), ["Index, Question, Options, Answer", "but MMVP has"]),
        (MMVP.replace("2,Are", "two,Are"), ["Index='two' in row 2"]),
        (MMVP.replace(",(b)\n", ",\n", 1), ["Correct Answer='' in row 2"]),
        (MMVP.replace('"In', "In", 1), ["line 4", "put values that hold commas in quotes"]),
        ("", ["must name its columns"]),
    ],
)
def test_refusals_name_file_value_and_remedy(tmp_path: Path, text: str, parts: list[str]) -> None:
    """Whatever is wrong with the table."""
    with pytest.raises(BadInputError) as error:
        Mmvp(written(tmp_path, text))
    assert all(part in str(error.value) for part in ["Questions.csv", *parts]), str(error.value)


def test_a_folder_without_the_table_is_refused(tmp_path: Path) -> None:
    """The file that was looked for is named."""
    with pytest.raises(BadInputError, match=r"Questions\.csv' does not exist"):
        Mmvp(tmp_path)


def test_the_manifest_says_what_decides_the_content(tmp_path: Path) -> None:
    """A corrected answer is other data."""
    one = Mmvp(written(tmp_path)).describe()
    assert one == Mmvp(tmp_path).describe()
    assert Mmvp(written(tmp_path, MMVP.replace(",(b)\n", ",(a)\n", 1))).describe() != one
