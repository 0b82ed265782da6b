"""Which samples of a data set are taken: by words, ids and column values, then the first or a random few."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hooked_mm.datasets.annotations import digest_of, read_bytes
from hooked_mm.errors import BadInputError, nearest, unknown
from hooked_mm.word_classes import wanted
from hooked_mm.words import word_pattern


@dataclass(frozen=True)
class Selection:
    """The samples for which everything asked for holds, in the data set's order.

    Attributes:
        words: Words or phrases, one of which must occur: as whole words, whatever their case.
        word_class: A named list of words (see `word_classes`), beside `words`.
        within: Where words are looked for: `"answer"`, `"question"`, or a column of text or of lists of text.
        ids: Sample ids, or a text file with one per line.
        equal: Per column (or `answer`, `question`) the value wanted, or a list of values of which one must be there.
        limit: At most so many of what is left: the first,
        seed: or, with a seed, some drawn by chance. Draws of one seed hold each other: 100 are among 1000.

    Raises:
        BadInputError: If an option has a value it can't have.
    """

    words: Sequence[str] = ()
    word_class: str | None = None
    within: str = "answer"
    ids: Sequence[str] | Path | None = None
    equal: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.wanted_words():
            word_pattern(self.wanted_words())
        if self.limit is not None and self.limit < 1:
            raise BadInputError(f"limit={self.limit}; it must be at least 1, or None for all")
        if self.seed is not None and self.limit is None:
            raise BadInputError(f"seed={self.seed} without a limit; say how many samples to draw with limit")

    def wanted_words(self) -> list[str]:
        """The words of which one must occur."""
        return wanted(self.words, self.word_class)

    def wanted_ids(self) -> list[str] | None:
        """The ids asked for, read from their file if need be.

        Raises:
            BadInputError: If there is no such text file, or no id.
        """
        wanted = self.ids
        if isinstance(wanted, str | os.PathLike):
            try:
                lines = read_bytes(Path(wanted)).decode("utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise BadInputError(f"{str(wanted)!r} is no text file of ids, one per line ({error})") from error
            wanted = [line.strip() for line in lines if line.strip()]
        if wanted is not None and not len(wanted):
            raise BadInputError(f"ids={str(self.ids)!r} names no sample; give at least one id, or None for all")
        return None if wanted is None else list(wanted)

    def describe(self) -> dict[str, Any]:
        """What is asked for, as far as it is not the default; ids as a digest."""
        said = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) not in (None, (), [], {})}
        if not self.wanted_words():
            said.pop("within", None)
        wanted = self.wanted_ids()
        if wanted is not None:
            said["ids"] = {"count": len(wanted), "digest": digest_of(wanted)}
        return said

    def choose(self, ids: Sequence[str], columns: Mapping[str, pa.ChunkedArray]) -> np.ndarray:
        """Indices of the samples chosen, (n,) int64, ascending.

        Args:
            ids: Every sample's id.
            columns: What can be asked about: `question`, `answer`, and the data set's own columns.

        Raises:
            BadInputError: If an id, a column or a value asked for does not exist, or nothing is left.
        """
        left = np.ones(len(ids), dtype=bool)
        wanted = self.wanted_ids()
        if wanted is not None:
            left &= _with_ids(ids, wanted)
        for name, value in self.equal.items():
            left = _kept(left, _with_value(columns, name, value), f"{name}={value!r}")
        if self.wanted_words():
            left = _kept(left, self._with_words(columns, left), f"one of {self.wanted_words()} in its {self.within}")
        chosen = np.flatnonzero(left)
        if self.limit is None or len(chosen) <= self.limit:
            return chosen
        if self.seed is None:
            return chosen[: self.limit]
        # By a checksum per sample, so that a draw is the same on every machine, whatever else the data set holds.
        drawn = sorted(chosen.tolist(), key=lambda index: hashlib.sha256(f"{self.seed}:{ids[index]}".encode()).digest())
        return np.sort(np.array(drawn[: self.limit], dtype=np.int64))

    def _with_words(self, columns: Mapping[str, pa.ChunkedArray], left: np.ndarray) -> np.ndarray:
        column = _column(columns, self.within)
        inner = column.type.value_type if _is_list(column.type) else column.type
        if not _is_text(inner):
            texts = [name for name in columns if _is_text(columns[name].type)]
            raise BadInputError(
                f"words are looked for in {self.within!r}, which holds {column.type}; choose one of text: "
                f"{', '.join(texts)}"
            )
        pattern = word_pattern(self.wanted_words())
        found = np.zeros(len(left), dtype=bool)
        for index, value in enumerate(column.to_pylist()):
            if left[index] and value is not None:
                texts = value if isinstance(value, list) else [value]
                found[index] = any(text is not None and pattern.search(text) for text in texts)
        return found


def _kept(left: np.ndarray, found: np.ndarray, what: str) -> np.ndarray:
    if not (left & found).any():
        raise BadInputError(f"none of the {left.sum()} samples left has {what}; ask for something else")
    return left & found


def _column(columns: Mapping[str, pa.ChunkedArray], name: str) -> pa.ChunkedArray:
    if name not in columns:
        raise unknown("column", name, columns)
    return columns[name]


def _with_ids(ids: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    lost = set(wanted) - set(ids)
    if lost:
        first = next(name for name in wanted if name in lost)
        close = nearest(str(first), ids) if len(ids) < 10_000 else ""
        raise BadInputError(
            f"{len(lost)} of the {len(wanted)} ids asked for are not in this data set, the first is {first!r}{close}; "
            f"its ids look like {ids[0]!r}"
        )
    names = set(wanted)
    return np.fromiter((name in names for name in ids), dtype=bool, count=len(ids))


def _with_value(columns: Mapping[str, pa.ChunkedArray], name: str, value: Any) -> np.ndarray:
    column = _column(columns, name)
    values = list(value) if isinstance(value, list | tuple | set) else [value]
    if not values:
        raise BadInputError(f"equal has no value for {name!r}; give one, or a list of them")
    wanted = pa.array([_as_kind(name, item, column.type) for item in values], type=column.type)
    known = pc.unique(column.combine_chunks())
    for item in wanted.filter(pc.invert(pc.is_in(wanted, value_set=known))):
        some = [str(other) for other in known.slice(0, 12).to_pylist()]
        close = nearest(str(item), map(str, known.to_pylist())) if len(known) < 10_000 else ""
        more = ", ..." if len(known) > len(some) else ""
        raise BadInputError(
            f"no sample has {name}={item.as_py()!r}{close}; there are {len(known)} values: {', '.join(some)}{more}"
        )
    return pc.is_in(column, value_set=wanted).to_numpy()


def _as_kind(name: str, value: Any, kind: pa.DataType) -> Any:
    """The value as the column's type has it; what would have to be guessed is refused."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if _is_text(kind) and (number or isinstance(value, str)):
        return str(value)
    if (pa.types.is_integer(kind) and number) or (pa.types.is_boolean(kind) and isinstance(value, bool)):
        return value
    if pa.types.is_floating(kind) and (number or isinstance(value, float)):
        return float(value)
    if _is_list(kind) or pa.types.is_nested(kind):
        raise BadInputError(f"column {name!r} holds {kind}, which can't be compared; look for words in it with within")
    quotes = "; in YAML and on the command line put words such as yes in quotes" if isinstance(value, bool) else ""
    raise BadInputError(f"column {name!r} holds {kind}, so it can't be {value!r} ({type(value).__name__}){quotes}")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
