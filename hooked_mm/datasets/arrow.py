"""A data set that Hugging Face's `datasets` saved to disk, read through pyarrow: that library is not needed.

The layout: `dataset_dict.json` lists splits, each a folder; in it `state.json` lists the Arrow files (stream format),
and `dataset_info.json` says what each column is. The files are mapped into memory, not read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hooked_mm.datasets.annotations import read_bytes
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.table import Table, TableDataModule, named
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.prepare import SampleImages


class ArrowFolder(TableDataModule):
    """What `save_to_disk` wrote as samples; pictures are decoded from the bytes or files that the rows hold.

    Columns that hold pictures or other bytes are not kept unless they are named; class labels are kept by their names.

    Args:
        path: The folder that `save_to_disk` wrote.
        split: Of a folder with several.
        image: The column of pictures: an `Image` feature, a list of them, or paths.
        text: The column of questions or prompts; None asks every sample what `template` says.
        answer: The column of answers, if there is one.
        id: The column of ids; None numbers the rows: `train-000000` and so on, by the split.
        columns: Which other columns to keep; None keeps all.
        where: Which samples are taken.
        template: What wraps the text (`{text}`) or is asked of all: a name of `TEMPLATES` or words.
        batch_size: Samples per batch.
        num_workers: Processes that decode pictures.

    Raises:
        BadInputError: If the folder is another one, a split or column does not exist, or a file is broken.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        image: str = "image",
        text: str | None = None,
        answer: str | None = None,
        id: str | None = None,
        columns: Sequence[str] | None = None,
        where: Selection | None = None,
        template: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        folder = _folder_of(Path(path), split)
        names = {"image": image, "text": text, "answer": answer, "id": id}
        super().__init__(_table(folder, split, names, columns), where, template, batch_size, num_workers)


def _table(folder: Path, split: str | None, names: dict[str, Any], keep: Sequence[str] | None) -> Table:
    state = _read_object(folder / "state.json")
    if state.get("_indices_data_files"):
        raise BadInputError(
            f"{str(folder)!r} was saved by an old version of datasets, with its order in a file of its own; load it "
            "and save it again with a newer one"
        )
    try:
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise BadInputError(
            f"{str(folder / 'state.json')!r} lists no '_data_files'; save the data set again"
        ) from error
    data = open_files(files)
    if not data.num_rows:
        raise BadInputError(f"{str(folder)!r} has no rows; give a data set with at least one")
    features = _read_object(folder / "dataset_info.json").get("features") or {}
    found = {name: _labelled(data[name], features.get(name)) for name in data.column_names}
    if keep is None:
        keep = [name for name in found if not _has_bytes(data[name].type) and name not in names.values()]
    prefix = state.get("_split") or split or "row"
    ids, question, answers, columns = named(str(folder), found, **names, keep=keep, prefix=prefix)
    made_of = {
        "files": {file.name: f"{file.stat().st_size} bytes" for file in files},
        "fingerprint": state.get("_fingerprint"),
        "split": split,
        "columns": {**names, "kept": list(columns)},
    }
    return Table(str(folder), ids, StoredPictures(files, names["image"]), columns, question, answers, made_of)


class StoredPictures:
    """The column of pictures of mapped Arrow files; a process that gets a copy maps them itself.

    Args:
        files: Arrow files in stream format.
        column: The column's name.
    """

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files, self.column = tuple(files), column
        self._values: pa.ChunkedArray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": None}

    def __getitem__(self, row: int) -> SampleImages:
        if self._values is None:
            self._values = open_files(self.files)[self.column]
        return _pictures(self._values[row].as_py())


def _pictures(value: Any) -> SampleImages:
    """A cell as the data set has it: a path, bytes, both in a struct, or a list of these."""
    if isinstance(value, list):
        return [_item(each) for each in value] or None
    return _item(value)


def _item(value: Any) -> Any:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return Path(value) if isinstance(value, str) else value


def open_files(files: Sequence[Path]) -> pa.Table:
    """The rows of Arrow files in stream format, mapped into memory.

    Raises:
        BadInputError: If a file is missing or broken.
    """
    tables = []
    for file in files:
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all())
        except (pa.ArrowException, OSError) as error:
            raise BadInputError(
                f"the Arrow file {str(file)!r} can't be read ({error}); copy the data set again"
            ) from error
    if not tables:
        return pa.table({})
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise BadInputError(f"the Arrow files of {str(files[0].parent)!r} differ in their columns ({error})") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path))
    except ValueError as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(f"{str(path)!r} is not JSON ({error}); copy the data set again") from error
    if not isinstance(content, dict):
        raise BadInputError(f"{str(path)!r} is no JSON object; copy the data set again")
    return content


def _folder_of(path: Path, split: str | None) -> Path:
    """The folder that holds one split's files."""
    if (path / "dataset_dict.json").is_file():
        splits = _read_object(path / "dataset_dict.json").get("splits") or []
        if split is None:
            raise BadInputError(f"{str(path)!r} holds several splits; choose one with split: {', '.join(splits)}")
        if split not in splits:
            raise unknown(f"split in {str(path)!r}", split, splits)
        return path / split
    if not (path / "state.json").is_file():
        raise BadInputError(
            f"{str(path)!r} is no folder that datasets' save_to_disk wrote: it has neither dataset_dict.json nor "
            "state.json; load the data set with that library and save it with save_to_disk"
        )
    if split is not None:
        raise BadInputError(f"{str(path)!r} holds one split, so split={split!r} can't be chosen; leave it out")
    return path


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_has_bytes(kind.field(index).type) for index in range(kind.num_fields))


def _labelled(values: pa.ChunkedArray, feature: Any) -> pa.ChunkedArray:
    """Class labels as their names; -1, which stands for no label, as null."""
    if not (isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")):
        return values
    names = pa.array(feature["names"])
    return pa.chunked_array([names.take(pc.if_else(pc.less(values, 0), None, values).combine_chunks())])
