"""A table's rows become samples when they are asked for; what could not be stored is refused at once."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.data import OWN_COLUMNS, Sample
from hooked_mm.datasets.folder import ImageFolder
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.table import RESERVED, InFolder, Rows, Table, TableDataModule, named
from hooked_mm.errors import BadInputError


def table(count: int = 3, **changes: Any) -> Table:
    """A small table of questions."""
    content: dict[str, Any] = {
        "source": "file.json",
        "ids": [f"s{n}" for n in range(count)],
        "pictures": InFolder(Path("in"), pa.array([f"{n}.jpg" for n in range(count)])),
        "columns": {"kind": [n % 2 for n in range(count)]},
        "question": [f"what is {n} ?" for n in range(count)],
        "answer": [None if n == 1 else str(n) for n in range(count)],
        "made_of": {"files": {"file.json": "sha256:1"}},
    }
    return Table(**{**content, **changes})


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from([None, 0]))
def test_every_row_is_handed_out_once(count: int, limit: int, batch_size: int, kind: int | None) -> None:
    """In order, as the table has it, in batches that name missing pictures."""
    where = Selection(limit=limit, equal={} if kind is None else {"kind": kind})
    data = TableDataModule(table(count), where, "Q: {text}", batch_size, 0)
    expected = [
        Sample(
            f"s{n}",
            Path(f"in/{n}.jpg"),
            f"Q: what is {n} ?",
            None if n == 1 else str(n),
            {"kind": n % 2, "question": f"what is {n} ?"},
        )
        for n in range(count)
        if kind in (None, n % 2)
    ][:limit]
    rows = data.dataset
    assert [rows[n] for n in range(len(rows))] == expected  # type: ignore[arg-type]
    assert data.ids() == [sample.id for sample in expected]


def test_several_pictures_or_none() -> None:
    """As the row has them."""
    names = pa.array([["a.jpg", "b.jpg"], None, []])
    rows = Rows(table(pictures=InFolder(Path("in"), names)), Selection(), None)
    assert [rows[n].images for n in range(3)] == [[Path("in/a.jpg"), Path("in/b.jpg")], None, []]
    with pytest.raises(IndexError):
        rows[3]


def test_a_process_that_gets_a_copy_makes_the_same() -> None:
    """Workers that are not forked are sent the data set."""
    rows = Rows(table(), Selection(limit=2), None)
    again = pickle.loads(pickle.dumps(rows))
    assert [again[n] for n in range(2)] == [rows[n] for n in range(2)]


def test_without_questions_the_template_is_asked() -> None:
    """And must be there."""
    data = TableDataModule(table(question=None), None, "describe the scene .", 2, 0)
    assert data.dataset[0].text == "describe the scene ."
    assert "question" not in data.dataset[0].columns
    with pytest.raises(BadInputError, match="a template must say what is asked"):
        TableDataModule(table(question=None), None, None, 2, 0)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"ids": ["a", "b", "a"]}, ["'file.json' has two entries that are 'a'"]),
        ({"columns": {"kind": [1, "x", 2]}}, ["values of 'kind' in 'file.json' are not of one type"]),
        ({"columns": {"kind": [{}, {}, {}]}}, ["column 'kind' of 'file.json' can't be stored"]),
        ({"columns": {"kind": ["\ud800", "", ""]}}, ["values of 'kind'"]),
        ({"columns": {"kind": [2**70, 1, 1]}}, ["values of 'kind'"]),
        ({"columns": {"image": [1, 2, 3], "text": ["", "", ""]}}, ["has columns image, text", "columns=[...]"]),
    ],
)
def test_what_could_not_be_stored_is_refused(changes: dict[str, Any], parts: list[str]) -> None:
    """Before hours of extraction, not behind them."""
    with pytest.raises(BadInputError) as error:
        TableDataModule(table(**changes), None, None, 2, 0)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_the_stores_own_names_are_reserved() -> None:
    """All that extraction refuses is refused here, where the file is known."""
    assert set(OWN_COLUMNS) < set(RESERVED)


def test_the_manifest_says_what_decides_the_content() -> None:
    """Files, selection, and the template's words rather than its name."""
    data = TableDataModule(table(), Selection(equal={"kind": 0}), "llava-short", 2, 0)
    assert data.describe() == {
        "name": "TableDataModule",
        "samples": 2,
        "files": {"file.json": "sha256:1"},
        "where": {"equal": {"kind": 0}},
        "template": "{text}\nAnswer the question using a single word or phrase.",
    }


COLUMNS: dict[str, list[Any]] = {
    "key": [7, 8],
    "picture": ["a", "b"],
    "ask": ["x ?", "y ?"],
    "say": [1, None],
    "z": [0, 0],
}
ALL: dict[str, Any] = {"text": "ask", "answer": "say", "id": "key", "image": "picture", "keep": None}


def test_named_columns() -> None:
    """What has a part of its own is not kept beside; whole numbers become text."""
    assert named("f", COLUMNS, **ALL) == (["7", "8"], ["x ?", "y ?"], ["1", None], {"z": [0, 0]})
    bare = {**ALL, "text": None, "answer": None, "id": None, "keep": ["say"]}
    numbered = named("f", COLUMNS, **bare, prefix="train")
    assert numbered == (["train-000000", "train-000001"], None, None, {"say": [1, None]})


@pytest.mark.parametrize(
    ("changes", "columns", "part"),
    [
        ({"text": "question"}, {}, "no text column 'question'; its columns: key, picture, ask, say, z"),
        ({"keep": ["z", "w"]}, {}, "no kept column 'w'"),
        ({"image": "image"}, {}, "no image column 'image'"),
        ({}, {"ask": ["x", None]}, "'ask' of row 1 of 'f' is missing"),
        ({}, {"key": ["a", 1.5]}, "'key' of row 1 of 'f' is 1.5 (float)"),
        ({}, {"say": [None, ["a"]]}, "'say' of row 1 of 'f' is ['a'] (list)"),
        ({}, {"say": [True, None]}, "True (bool)"),
    ],
)
def test_named_columns_that_do_not_fit(changes: dict, columns: dict, part: str) -> None:
    """The column, the row and the value are named."""
    with pytest.raises(BadInputError) as error:
        named("f", {**COLUMNS, **columns}, **{**ALL, **changes})
    assert part in str(error.value)


def test_a_folder_that_is_missing_is_told_before_a_run(tmp_path: Path) -> None:
    """A mistyped path is one error, not a skipped sample per row."""
    (tmp_path / "rows.jsonl").write_text('{"image": "a.jpg", "q": "what ?"}')
    data = ImageFolder(tmp_path / "fotos", file=tmp_path / "rows.jsonl", text="q")
    with pytest.raises(BadInputError, match=r"no folder of pictures .*fotos"):
        data.check()
    (tmp_path / "fotos").mkdir()
    data.check()
