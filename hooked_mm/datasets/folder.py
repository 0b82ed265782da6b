"""A folder of pictures: with a JSONL or CSV file that says what is asked about which, or on its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from hooked_mm.datasets.annotations import digest, digest_of, read_bytes, read_csv
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.table import InFolder, Table, TableDataModule, named
from hooked_mm.errors import BadInputError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Endings of the files that a folder on its own is searched for, whatever their case."""


class ImageFolder(TableDataModule):
    """Pictures of your own as samples.

    With a file, one sample per row: its picture (a path relative to `images`, in JSONL also a list of paths, or null
    for none), text, answer and id stand in the columns named; all other columns are kept. Values in CSV are text.

    Without a file, one sample per picture in the folder and the folders in it, by name; its id is its path.

    Args:
        images: The folder of pictures.
        file: A `.jsonl` or `.csv` file.
        image: The column of pictures.
        text: The column of questions or prompts; None asks every sample what `template` says.
        answer: The column of answers, if there is one.
        id: The column of ids; None numbers the rows: `row-000000` and so on.
        columns: Which other columns to keep; None keeps all.
        where: Which samples are taken.
        template: What wraps the text (`{text}`) or is asked of all: a name of `TEMPLATES` or words.
        batch_size: Samples per batch.
        num_workers: Processes that decode pictures.

    Raises:
        BadInputError: If a file or column is missing, a row can't be read, ids repeat, or no option says what is asked.
    """

    def __init__(
        self,
        images: str | Path,
        file: str | Path | None = None,
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
        names = {"image": image, "text": text, "answer": answer, "id": id, "columns": columns}
        if file is None:
            given = [name for name, value in names.items() if value is not None and name != "image"]
            if given:
                raise BadInputError(f"{', '.join(given)} name columns of a file; give the file, or leave them out")
            table = _bare(Path(images))
        else:
            table = _described(Path(images), Path(file), image, text, answer, id, columns)
        super().__init__(table, where, template, batch_size, num_workers)


def _bare(folder: Path) -> Table:
    if not folder.is_dir():
        raise BadInputError(f"the folder {str(folder)!r} does not exist; check the path")
    found = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise BadInputError(f"the folder {str(folder)!r} holds no picture ({', '.join(SUFFIXES)})")
    return Table(
        source=str(folder),
        ids=found,
        pictures=InFolder(folder, pa.array(found)),
        columns={},
        made_of={"images": folder.name, "files": {"names": digest_of(found)}},
    )


def _described(
    folder: Path,
    path: Path,
    image: str,
    text: str | None,
    answer: str | None,
    id: str | None,
    keep: Sequence[str] | None,
) -> Table:
    raw = read_bytes(path)
    if path.suffix.lower() == ".csv":
        header, rows = read_csv(path, raw)
        found: dict[str, list[Any]] = {name: [row[place] for row in rows] for place, name in enumerate(header)}
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        found = _read_lines(path, raw)
    else:
        raise BadInputError(f"{str(path)!r} is neither .jsonl nor .csv; save it as one of them")
    if not next(iter(found.values()), ()):
        raise BadInputError(f"{str(path)!r} has no rows; give at least one")
    ids, question, answers, columns = named(str(path), found, text=text, answer=answer, id=id, image=image, keep=keep)
    return Table(
        source=str(path),
        ids=ids,
        pictures=InFolder(folder, _paths(path, image, found[image])),
        columns=columns,
        question=question,
        answer=answers,
        made_of={
            "files": {path.name: digest(raw)},
            "images": folder.name,
            "columns": {"image": image, "text": text, "answer": answer, "id": id, "kept": list(columns)},
        },
    )


def _read_lines(path: Path, raw: bytes) -> dict[str, list[Any]]:
    """The columns of a JSONL file; what a row lacks is null."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInputError(
                f"{str(path)!r}, line {number} is not JSON ({error}); give one object per line"
            ) from error
        if not isinstance(row, dict):
            raise BadInputError(f"{str(path)!r}, line {number} is {row!r:.60}, no object; give one object per line")
        rows.append(row)
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}


def _paths(path: Path, name: str, values: Sequence[Any]) -> pa.Array:
    """Paths of pictures, as lists where any row has several."""
    for row, value in enumerate(values):
        good = all(isinstance(each, str) and each for each in (value if isinstance(value, list) else [value]))
        if not good and value is not None:
            raise BadInputError(
                f"{name!r} of row {row} of {str(path)!r} is {value!r:.60}; it must be a path, a list of paths, or in "
                "JSONL null for no picture"
            )
    if any(isinstance(value, list) for value in values):
        values = [value if value is None or isinstance(value, list) else [value] for value in values]
        return pa.array(values, type=pa.list_(pa.string()))
    return pa.array(values, type=pa.string())
