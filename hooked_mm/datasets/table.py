"""A data set as a table: what its files say, column by column, and samples made of it when they are asked for.

A data set's own module reads its files into a `Table`; everything else (selection, templates, ids, what a store's
manifest says) is here, once for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset

from hooked_mm.data import OWN_COLUMNS, Sample, SampleDataModule
from hooked_mm.datasets.annotations import first_repeated
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.templates import fill, resolve
from hooked_mm.errors import BadInputError
from hooked_mm.prepare import SampleImages

RESERVED = (*OWN_COLUMNS, "question")
"""Names of columns that a store writes itself, and of the question before its template."""


class Pictures(Protocol):
    """Per row of a table what a sample has for pictures; nothing is decoded here."""

    def __getitem__(self, row: int) -> SampleImages:
        """Paths, or what decodes when it is read."""


@dataclass(frozen=True)
class InFolder:
    """Pictures by their file names in a folder: one name, a list of names, or None per row."""

    folder: Path
    names: pa.Array

    def __getitem__(self, row: int) -> SampleImages:
        name = self.names[row].as_py()
        if isinstance(name, list):
            return [self.folder / each for each in name]
        return None if name is None else self.folder / name


@dataclass(frozen=True)
class Table:
    """What a data set's files say, every sequence with one entry per sample.

    Attributes:
        source: The file, as errors name it.
        ids: Unique and stable: they follow from what the file says of the sample, not from what is selected.
        pictures: Per sample.
        columns: Everything else that the data set knows.
        question: What is asked, if it is the data set that asks.
        answer: What is answered; None where it is not known.
        made_of: What decides the content, for a store's manifest: files with digests, splits, options.
    """

    source: str
    ids: Sequence[str]
    pictures: Pictures
    columns: Mapping[str, Any]
    question: Any = None
    answer: Any = None
    made_of: Mapping[str, Any] = field(default_factory=dict)


class Rows(Dataset):
    """Rows of a table as samples, made when asked for.

    Raises:
        BadInputError: If ids repeat, a column mixes types, can't be stored, or has a name that the store uses itself.
    """

    def __init__(self, table: Table, where: Selection, template: str | None) -> None:
        repeated = first_repeated(table.ids)
        if repeated is not None:
            raise BadInputError(f"{table.source!r} has two entries that are {repeated!r}; ids must be unique")
        clashing = sorted(set(table.columns) & set(RESERVED))
        if clashing:
            raise BadInputError(
                f"{table.source!r} has columns {', '.join(clashing)}, whose names a store uses itself; say which of "
                "them is the text or the answer, leave them out with columns=[...], or rename them"
            )
        self.columns = {name: _array(table.source, name, values) for name, values in table.columns.items()}
        if table.question is not None:
            self.columns["question"] = _array(table.source, "question", table.question)
        _check_storable(table.source, self.columns)
        answer = [None] * len(table.ids) if table.answer is None else table.answer
        self.answer = _array(table.source, "answer", answer)
        self.names, self.pictures, self.template = table.ids, table.pictures, template
        self.chosen = where.choose(table.ids, {**self.columns, "answer": self.answer})

    def __len__(self) -> int:
        return len(self.chosen)

    def ids(self) -> list[str]:
        """The samples' ids, in order."""
        return [self.names[row] for row in self.chosen.tolist()]

    def __getitem__(self, index: int) -> Sample:
        row = int(self.chosen[index])
        columns = {name: values[row].as_py() for name, values in self.columns.items()}
        text = fill(self.template, columns.get("question"))
        return Sample(self.names[row], self.pictures[row], text, self.answer[row].as_py(), columns)


def _array(source: str, name: str, values: Any) -> pa.ChunkedArray:
    if isinstance(values, pa.ChunkedArray):
        return values
    try:
        made = pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise BadInputError(
            f"the values of {name!r} in {source!r} are not of one type ({error}); give them one, or leave the column "
            "out"
        ) from error
    if pa.types.is_null(made.type):
        made = made.cast(pa.string())
    return pa.chunked_array([made])


def _check_storable(source: str, columns: Mapping[str, pa.ChunkedArray]) -> None:
    """At once rather than when the first shard is written."""
    for name, values in columns.items():
        try:
            pq.write_table(pa.table({name: values.slice(0, 0)}), pa.BufferOutputStream())
        except pa.ArrowException as error:
            raise BadInputError(f"column {name!r} of {source!r} can't be stored ({error}); leave it out") from error


class TableDataModule(SampleDataModule):
    """What data modules over a table share.

    Args:
        table: What the files say.
        where: Which samples are taken; None takes all.
        template: What wraps the question, or is asked where there is none: a name of `TEMPLATES` or words. None asks
            the question as it stands.
        batch_size: Samples per batch.
        num_workers: Processes that decode pictures.

    Raises:
        BadInputError: If the table, the selection or the template can't be used; see `Rows`, `Selection`, `resolve`.
    """

    def __init__(
        self, table: Table, where: Selection | None, template: str | None, batch_size: int, num_workers: int
    ) -> None:
        where = where or Selection()
        asks = table.question is not None
        if template is None and not asks:
            raise BadInputError(
                f"{table.source!r} has no questions, or no column of them was named; a template must say what is asked"
            )
        words = None if template is None else resolve(template, asks=asks)
        self.made_of = {**table.made_of, "where": where.describe(), "template": words}
        super().__init__(Rows(table, where, words), batch_size, num_workers)

    def check(self) -> None:
        """Refuse a folder of pictures that there is not.

        Raises:
            BadInputError: It names the folder.
        """
        assert isinstance(self.dataset, Rows)
        pictures = self.dataset.pictures
        if isinstance(pictures, InFolder) and not pictures.folder.is_dir():
            raise BadInputError(f"there is no folder of pictures {str(pictures.folder)!r}; check the path")

    def describe(self) -> dict[str, Any]:
        """What decides the content: files with digests, options, selection and template."""
        return {**super().describe(), **self.made_of}


def named(
    source: str,
    columns: Mapping[str, Any],
    *,
    text: str | None,
    answer: str | None,
    id: str | None,
    image: str | None,
    keep: Sequence[str] | None,
    prefix: str = "row",
) -> tuple[list[str], Any, Any, dict[str, Any]]:
    """Ids, questions, answers and kept columns of a table whose columns users name.

    Args:
        source: The file, as errors name it.
        columns: All columns, of one length.
        text: The column that asks, if any.
        answer: The column that answers, if any.
        id: The column of ids; None numbers the rows from 0 on.
        image: The column of pictures, which is not kept.
        keep: Other columns to keep; None keeps all.
        prefix: What numbered ids begin with.

    Raises:
        BadInputError: If a column does not exist, or text, answers or ids are of another type than that or lacking.
    """
    for role, name in (
        ("text", text),
        ("answer", answer),
        ("id", id),
        ("image", image),
        *(("kept", k) for k in keep or ()),
    ):
        if name is not None and name not in columns:
            raise BadInputError(f"{source!r} has no {role} column {name!r}; its columns: {', '.join(columns)}")
    used = {name for name in (text, answer, id, image) if name is not None}
    kept = {name: columns[name] for name in (columns if keep is None else keep) if name not in used}
    count = len(next(iter(columns.values()), ()))
    ids = [f"{prefix}-{row:06d}" for row in range(count)]
    if id is not None:
        ids = [str(value) for value in _plain(source, id, columns[id], needed=True)]
    question = None if text is None else [str(value) for value in _plain(source, text, columns[text], needed=True)]
    answers = None
    if answer is not None:
        answers = [None if v is None else str(v) for v in _plain(source, answer, columns[answer], needed=False)]
    return ids, question, answers, kept


def _plain(source: str, name: str, values: Any, *, needed: bool) -> list[str | int | None]:
    """The values as Python has them, all of them text or whole numbers."""
    found = values.to_pylist() if isinstance(values, pa.ChunkedArray) else list(values)
    for row, value in enumerate(found):
        if type(value) not in (str, int) and (needed or value is not None):
            what = "is missing" if value is None else f"is {value!r:.60} ({type(value).__name__})"
            raise BadInputError(f"{name!r} of row {row} of {source!r} {what}; it must be text or a whole number")
    return found
