"""Pictures of one's own, with a table beside them or without."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from hooked_mm.data import Sample
from hooked_mm.datasets.folder import ImageFolder
from hooked_mm.datasets.selection import Selection
from hooked_mm.errors import BadInputError
from tests.official import OWN, jsonl

NAMES = {"text": "ask", "answer": "say", "id": "key"}


def samples(data: ImageFolder) -> list[Sample]:
    """All samples of a data module."""
    return [data.dataset[index] for index in range(len(data.dataset))]  # type: ignore[arg-type]


def test_jsonl(tmp_path: Path) -> None:
    """One picture, several, none; other columns are kept, what a row lacks is null."""
    one, two, three = samples(ImageFolder("in", jsonl(tmp_path / "x.jsonl"), **NAMES))
    assert one == Sample(
        "a", [Path("in/1.jpg")], "what is it ?", "a cat", {"question": "what is it ?", "score": 0.5, "tags": ["x"]}
    )
    assert (two.images, two.answer, two.columns["tags"]) == ([Path("in/1.jpg"), Path("in/sub/2.png")], None, None)
    assert (three.images, three.id) == (None, "c")


def test_csv(tmp_path: Path) -> None:
    """Values are text; a path is handed over as one, so that a store can name it."""
    (tmp_path / "x.csv").write_text('\ufeffid,image,text,n\n007,1.jpg,"what, then ?",1\n', encoding="utf-8")
    data = ImageFolder("in", tmp_path / "x.csv", text="text", id="id")
    assert samples(data) == [
        Sample("007", Path("in/1.jpg"), "what, then ?", None, {"question": "what, then ?", "n": "1"})
    ]
    assert ImageFolder("in", tmp_path / "x.csv", text="text", where=Selection(equal={"n": 1})).ids() == ["row-000000"]


def test_columns_and_prompts_by_options(tmp_path: Path) -> None:
    """Rows are numbered where no column names them; one prompt for all where none asks."""
    path = jsonl(tmp_path / "x.ndjson")
    data = ImageFolder(
        "in", path, columns=["score"], template="describe the scene .", where=Selection(equal={"score": 1})
    )
    assert samples(data) == [
        Sample("row-000001", [Path("in/1.jpg"), Path("in/sub/2.png")], "describe the scene .", None, {"score": 1.0})
    ]
    assert ImageFolder("in", path, **NAMES, where=Selection(words=["cat"])).ids() == ["a"]


def test_a_bare_folder(tmp_path: Path) -> None:
    """Every picture, also in folders, sorted by path; hidden and other files are not samples, broken pictures are."""
    for name in ("b.PNG", "sub/a.jpg", "a.jpeg", ".hidden/x.png", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    Image.new("RGB", (4, 4)).save(tmp_path / "sub" / "a.jpg")
    data = ImageFolder(tmp_path, template="describe the scene .")
    assert data.ids() == ["a.jpeg", "b.PNG", "sub/a.jpg"]
    said = data.describe()
    (tmp_path / "b.PNG").rename(tmp_path / "c.PNG")
    assert ImageFolder(tmp_path, template="describe the scene .").describe() != said


@pytest.mark.parametrize(
    ("name", "content", "options", "parts"),
    [
        ("x.jsonl", '{"image": "a"}\n{"image": \n', {}, ["line 2 is not JSON"]),
        ("x.jsonl", '{"image": "a"}\n[1]\n', {}, ["line 2 is [1], no object"]),
        ("x.jsonl", "", {}, ["has no rows"]),
        ("x.csv", "image,text\n", {}, ["has no rows"]),
        ("x.txt", "image", {}, ["neither .jsonl nor .csv"]),
        ("x.jsonl", '{"image": "a"}\n{"image": 5}\n', {}, ["'image' of row 1", "is 5"]),
        ("x.jsonl", '{"image": ["a", null]}\n', {}, ["'image' of row 0", "['a', None]"]),
        ("x.csv", "image,ask\n,b\n", {}, ["'image' of row 0", "''"]),
        ("x.jsonl", '{"image": "a", "answer": "b"}\n', {}, ["has columns answer", "say which of them is"]),
        ("x.jsonl", '{"image": "a", "n": 1}\n{"image": "b", "n": "c"}\n', {}, ["values of 'n'", "not of one type"]),
        ("x.jsonl", '{"picture": "a"}\n', {}, ["no image column 'image'", "picture"]),
        ("x.jsonl", '{"image": "a", "id": 1}\n{"image": "b", "id": 1}\n', {"id": "id"}, ["two entries that are '1'"]),
        ("x.jsonl", '{"image": "a"}\n', {"template": None}, ["has no questions", "template"]),
    ],
)
def test_refusals_name_file_value_and_remedy(
    tmp_path: Path, name: str, content: str, options: dict, parts: list[str]
) -> None:
    """Whatever is wrong with the file or does not fit it."""
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInputError) as error:
        ImageFolder("in", tmp_path / name, **{"template": "describe the scene .", **options})
    assert all(part in str(error.value) for part in [name, *parts]), str(error.value)


def test_bare_folders_that_can_not_be_used(tmp_path: Path) -> None:
    """Missing, without pictures, or with options that are about a file."""
    for options, part in (
        ({"images": tmp_path / "none"}, "does not exist"),
        ({"images": tmp_path}, "holds no picture"),
        ({"images": tmp_path, "text": "ask"}, "text name columns of a file"),
    ):
        with pytest.raises(BadInputError, match=part):
            ImageFolder(**options, template="describe the scene .")


def test_the_manifest_says_what_decides_the_content(tmp_path: Path) -> None:
    """Which column answers is a part of it."""
    path = jsonl(tmp_path / "x.jsonl")
    one = ImageFolder("in", path, **NAMES)
    assert one.describe() == ImageFolder("other/in", path, **NAMES).describe()
    assert one.describe() != ImageFolder("in", path, **{**NAMES, "answer": None}).describe()
    assert one.describe() != ImageFolder("in", jsonl(path, OWN[:2]), **NAMES).describe()
