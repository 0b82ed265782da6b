"""Annotation files are read as they are, or refused by what they are."""

from __future__ import annotations

import csv
import gc
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.datasets.annotations import (
    Format,
    describe,
    digest,
    digest_of,
    first_repeated,
    read_bytes,
    read_csv,
    read_json,
)
from hooked_mm.errors import BadInputError

PETS = Format("pets", {"pets": {"name": (str,), "age": (int, float)}})
PLAIN = Format("plain", {"": {"name": (str,)}})


def written(path: Path, content: Any) -> Path:
    """A JSON file."""
    path.write_text(json.dumps(content))
    return path


def test_the_format_that_fits_is_told(tmp_path: Path) -> None:
    """Of several that will do; content and digest are the file's."""
    pets = {"pets": [{"name": "Tom", "age": 3, "more": None}], "by": "us"}
    path = written(tmp_path / "a.json", pets)
    found = read_json(path, PLAIN, PETS)
    assert (found.format, found.content, found.path) == (PETS, pets, path)
    assert found.digest == digest(path.read_bytes())
    assert read_json(written(path, [{"name": "Tom"}]), PLAIN, PETS).format is PLAIN


def test_objects_can_be_shortened_while_they_are_read(tmp_path: Path) -> None:
    """Garbage collection is as it was before, on or off."""
    path = written(tmp_path / "a.json", {"pets": [{"name": "Tom", "age": 3, "toys": [{"toy": "ball"}]}]})
    found = read_json(path, PETS, shorten=lambda entry: entry.get("toy", entry))
    assert found.content["pets"][0]["toys"] == ["ball"]
    assert gc.isenabled()
    gc.disable()
    try:
        read_json(path, PETS)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"pets": [{"name": "Tom", "age": 3}, {"name": "Jim"}]}, ["entry 1 of 'pets' has no 'age', only name"]),
        ({"pets": [{"name": "Tom", "age": 3}, {"name": 5, "age": 1}]}, ["name=5 (int), which must be str"]),
        ({"pets": [{"name": "Tom", "age": True}]}, ["age=True (bool)", "int or float"]),
        ({"pets": [{"name": "Tom", "age": 3}, "Jim"]}, ["entry 1 of 'pets' is 'Jim', no object"]),
        ({"pets": []}, ["an object with pets", "give the file as downloaded"]),
        ({"pets": [{"name": "Tom"}]}, ["an object with pets (each with name)"]),
        ([{"name": "Tom"}], ["a list of objects with name"]),
        ("Tom", ["a JSON str"]),
        ({}, ["an object with nothing"]),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, parts: list[str]) -> None:
    """By entry and field, or by the keys that were found."""
    path = written(tmp_path / "a.json", content)
    with pytest.raises(BadInputError) as error:
        read_json(path, PETS)
    assert all(part in str(error.value) for part in ["a.json", *parts]), str(error.value)


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b'{"pets": [', "is not JSON"),
        (b"", "is not JSON"),
        (gzip.compress(b"{}", mtime=0), "it is an archive: unpack it"),
        (b"PK\x03\x04", "it is an archive: unpack it"),
        (b"\xff\xfe\xff", "is not JSON"),
    ],
)
def test_what_is_not_json_is_refused(tmp_path: Path, raw: bytes, part: str) -> None:
    """Cut off, empty, packed."""
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(BadInputError, match=part):
        read_json(tmp_path / "a.json", PETS)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    """Each by its own remedy."""
    with pytest.raises(BadInputError, match="does not exist; check the path"):
        read_bytes(tmp_path / "none.json")
    with pytest.raises(BadInputError, match="is a folder; give the file in it"):
        read_bytes(tmp_path)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=6)


@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), max_size=5)))
def test_csv_comes_back_as_it_was_written(rows: list[list[str]]) -> None:
    """Commas, quotes and line breaks within values; rows of one empty value aside, which are blank lines."""
    rows = [row for row in rows if row != [""]]
    header = [f"c{place}" for place in range(len(rows[0]) if rows else 2)]
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    assert read_csv(Path("x.csv"), text.getvalue().encode()) == (header, rows)


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"a,b\n1\n", "line 2: 1 values for 2 columns"),
        (b"a,b\n1,2,3\n", "3 values for 2 columns"),
        (b"a,a\n1,2\n", "each once"),
        (b"", "must name its columns"),
        (b'a,b\n"1,2\n', "is not CSV"),
        ("a\nä\n".encode("latin-1"), "is not CSV in UTF-8"),
    ],
)
def test_broken_csv_is_refused(raw: bytes, part: str) -> None:
    """With the line, where there is one."""
    with pytest.raises(BadInputError, match=part):
        read_csv(Path("x.csv"), raw)


@given(st.lists(st.integers(0, 8)))
def test_the_first_repeated_value(values: list[int]) -> None:
    """The first that occurred before."""
    expected = [value for place, value in enumerate(values) if value in values[:place]]
    assert first_repeated(values) == (expected[0] if expected else None)


def test_digests_tell_order_and_content() -> None:
    """Two lists of the same texts in another order are other data."""
    assert digest_of(["a", "b"]) == digest_of(("a", "b"))
    assert len({digest_of(["a", "b"]), digest_of(["b", "a"]), digest_of(["ab"])}) == 3
    assert describe([1]) == "a JSON list without objects"
