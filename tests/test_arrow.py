"""Data sets in the layout of `save_to_disk`, written here byte by byte as that writes them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hooked_mm.datasets.arrow import ArrowFolder, StoredPictures
from hooked_mm.datasets.selection import Selection
from hooked_mm.errors import BadInputError
from hooked_mm.prepare import load_images
from tests.official import PICTURE, arrow_rows, noise, png, save_to_disk

NAMES = {"text": "question", "answer": "answer"}


def test_rows_become_samples(tmp_path: Path) -> None:
    """Across files and batches; class labels by name; columns of pictures are not kept."""
    data = ArrowFolder(save_to_disk(tmp_path / "set", arrow_rows()), **NAMES)
    assert data.ids() == [f"train-{n:06d}" for n in range(5)]
    samples = [data.dataset[n] for n in range(5)]
    assert [(sample.text, sample.answer) for sample in samples] == [(f"what is {n} ?", f"thing {n}") for n in range(5)]
    assert [sample.columns["label"] for sample in samples] == ["cat", "dog", None, "cat", "dog"]
    assert samples[4].columns == {"question": "what is 4 ?", "label": "dog", "idx": 40}
    assert samples[1].images == Path("/nowhere/1.png")
    assert samples[3].images is None
    assert samples[0] == data.dataset[0] != samples[4]


def test_pictures_are_decoded_or_refused(tmp_path: Path) -> None:
    """Bytes give the very pixels; what can't be read is refused with the reason."""
    data = ArrowFolder(save_to_disk(tmp_path / "set", arrow_rows()), **NAMES)
    pictures = [data.dataset[number].images for number in range(5)]  # type: ignore[union-attr]
    for number in (0, 4):
        (decoded,) = load_images(pictures[number])
        assert (np.asarray(decoded) == np.asarray(noise(number))).all()
    assert load_images(pictures[3]) == []
    for number, reason in ((1, "/nowhere/1.png"), (2, "60 bytes")):
        with pytest.raises(BadInputError, match=reason):
            load_images(pictures[number])


def test_lists_of_pictures_and_paths(tmp_path: Path) -> None:
    """A list feature gives several; a picture missing in it is not passed over; a column of text holds paths."""
    schema = pa.schema([("images", pa.list_(PICTURE)), ("file", pa.string())])
    features = {
        "images": {"feature": {"_type": "Image"}, "_type": "List"},
        "file": {"dtype": "string", "_type": "Value"},
    }
    items: list[dict[str, Any]] = [
        {"images": [{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}], "file": "a.png"},
        {"images": [{"bytes": png(0), "path": None}, None], "file": None},
        {"images": [], "file": "b.png"},
    ]
    folder = save_to_disk(tmp_path / "set", items, schema, features)
    data = ArrowFolder(folder, image="images", template="describe the scene .")
    decoded = load_images(data.dataset[0].images)
    assert len(decoded) == 2
    assert (np.asarray(decoded[1]) == np.asarray(noise(1))).all()
    with pytest.raises(BadInputError, match="NoneType"):
        load_images(data.dataset[1].images)
    assert load_images(data.dataset[2].images) == []
    assert data.dataset[2].columns == {"file": "b.png"}
    paths = ArrowFolder(folder, image="file", template="describe the scene .")
    assert [paths.dataset[n].images for n in range(3)] == [Path("a.png"), None, Path("b.png")]


def test_splits(tmp_path: Path) -> None:
    """A folder of several is read by one of them."""
    for name, count in (("train", 3), ("test", 2)):
        save_to_disk(tmp_path / name, arrow_rows(count), split=name)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert ArrowFolder(tmp_path, split="test", **NAMES).ids() == ["test-000000", "test-000001"]
    with pytest.raises(BadInputError, match="choose one with split: train, test"):
        ArrowFolder(tmp_path, **NAMES)
    with pytest.raises(BadInputError, match=r"no split in .*'val'; there are: train, test"):
        ArrowFolder(tmp_path, split="val", **NAMES)
    with pytest.raises(BadInputError, match="holds one split, so split='train'"):
        ArrowFolder(tmp_path / "train", split="train", **NAMES)


def test_filters_and_columns(tmp_path: Path) -> None:
    """By words, labels and ids of a column; only the columns named are kept."""
    folder = save_to_disk(tmp_path / "set", arrow_rows())
    assert ArrowFolder(folder, **NAMES, where=Selection(equal={"label": "dog"})).ids() == [
        "train-000001",
        "train-000004",
    ]
    assert ArrowFolder(folder, **NAMES, id="idx", where=Selection(words=["thing 3"])).ids() == ["30"]
    data = ArrowFolder(folder, **NAMES, columns=["idx"])
    assert data.dataset[2].columns == {"question": "what is 2 ?", "idx": 20}


def test_a_copy_maps_the_files_itself(tmp_path: Path) -> None:
    """What is sent to a process that is not forked holds no picture."""
    folder = save_to_disk(
        tmp_path / "set", [{**row, "image": {"bytes": b"x" * 10**6, "path": None}} for row in arrow_rows()]
    )
    data = ArrowFolder(folder, **NAMES)
    assert data.dataset[0].images == b"x" * 10**6
    sent = pickle.dumps(data.dataset)
    assert len(sent) < 10**5
    assert pickle.loads(sent)[0].images == b"x" * 10**6


def changed(folder: Path, name: str, content: Any) -> None:
    """Overwrite a file with text or JSON."""
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("state.json", {"_data_files": [{"filename": "data.arrow"}]}, "data.arrow"),
        ("state.json", {"_split": None}, "lists no '_data_files'"),
        ("state.json", {"_data_files": []}, "has no rows"),
        ("state.json", {"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}, "old version"),
        ("state.json", "{", "is not JSON"),
        ("state.json", [1], "no JSON object"),
        ("dataset_info.json", "", "is not JSON"),
        ("data-00001-of-00002.arrow", "text", "data-00001-of-00002.arrow' can't be read"),
    ],
)
def test_broken_folders_are_refused(tmp_path: Path, name: str, content: Any, part: str) -> None:
    """By the file that is wrong."""
    folder = save_to_disk(tmp_path / "set", arrow_rows())
    changed(folder, name, content)
    with pytest.raises(BadInputError) as error:
        ArrowFolder(folder, **NAMES)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"image": "picture"}, "no image column 'picture'; its columns: image, question, answer, label, mask, idx"),
        ({"text": "ask"}, "no text column 'ask'"),
        ({"answer": None}, "has columns answer"),
        ({"text": None}, "no column of them was named; a template must say"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path: Path, options: dict, part: str) -> None:
    """By their name."""
    with pytest.raises(BadInputError) as error:
        ArrowFolder(save_to_disk(tmp_path / "set", arrow_rows()), **{**NAMES, **options})
    assert part in str(error.value)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    """With how to make such a folder."""
    with pytest.raises(BadInputError, match="save it with save_to_disk"):
        ArrowFolder(tmp_path, **NAMES)


def test_columns_that_differ_between_files_are_refused(tmp_path: Path) -> None:
    """They can't be one table."""
    folder = save_to_disk(tmp_path / "set", arrow_rows())
    other = save_to_disk(tmp_path / "other", [{"image": None}], pa.schema([("image", PICTURE)]))
    (other / "data-00000-of-00002.arrow").rename(folder / "data-00001-of-00002.arrow")
    with pytest.raises(BadInputError, match="differ in their columns"):
        ArrowFolder(folder, **NAMES)


def test_the_manifest_says_what_decides_the_content(tmp_path: Path) -> None:
    """Files with sizes and the fingerprint that `datasets` gave them, not where they lie."""
    one = ArrowFolder(save_to_disk(tmp_path / "a", arrow_rows()), **NAMES).describe()
    assert one == ArrowFolder(save_to_disk(tmp_path / "b", arrow_rows()), **NAMES).describe()
    assert one != ArrowFolder(save_to_disk(tmp_path / "c", arrow_rows(3)), **NAMES).describe()
    assert one["fingerprint"] == "a1b2c3d4e5f60718"


def test_pictures_of_a_table_are_found_by_row(tmp_path: Path) -> None:
    """On their own, as a data set uses them."""
    folder = save_to_disk(tmp_path / "set", arrow_rows())
    stored = StoredPictures([folder / "data-00001-of-00002.arrow"], "image")
    assert stored[0] is None
    assert stored[1] == png(4)
