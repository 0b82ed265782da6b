"""Reading annotation files: once, checked entry by entry, and refused by what they look like instead.

A data set declares the formats of its JSON files with `declare`. A file of another format is told by its keys, and by
the declared format that it fits.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_mm.errors import BadInputError

Fields = Mapping[str, tuple[type, ...]]
WHOLE = ""
"""The name of a format's list where the file itself is the list."""


@dataclass(frozen=True)
class Format:
    """A kind of JSON file: its name, and per list in it the fields that every entry has, with their types."""

    name: str
    lists: Mapping[str, Fields]

    def fits(self, content: Any) -> bool:
        """Whether the file has the lists, and their first entries the fields."""
        found = lists_of(content)
        return all(name in found and fields.keys() <= found[name][0].keys() for name, fields in self.lists.items())

    def check(self, path: Path, content: Any) -> None:
        """Refuse a file of which any entry lacks a field or has it of another type.

        Raises:
            BadInputError: Names the file, the entry and the field.
        """
        for name, fields in self.lists.items():
            where = f" of {name!r}" if name else ""
            for number, entry in enumerate(content[name] if name else content):
                if not isinstance(entry, dict):
                    raise BadInputError(f"{str(path)!r}: entry {number}{where} is {entry!r:.60}, no object; repair it")
                for field, kinds in fields.items():
                    if type(entry.get(field)) not in kinds:
                        raise _wrong_field(path, f"entry {number}{where}", entry, field, kinds)


_DECLARED: list[Format] = []


def declare(name: str, **lists: Fields) -> Format:
    """A format that files of others are told from; the keyword `whole` stands for a file that is itself the list."""
    made = Format(name, {WHOLE if key == "whole" else key: fields for key, fields in lists.items()})
    _DECLARED.append(made)
    return made


@dataclass(frozen=True)
class Annotations:
    """A file that was read: its content, the format it has, and the digest of its bytes."""

    path: Path
    content: Any
    format: Format
    digest: str


def read_json(path: str | Path, *formats: Format, shorten: Callable[[dict], Any] | None = None) -> Annotations:
    """Read a JSON file that has one of the formats.

    Args:
        path: The file.
        formats: Those that will do.
        shorten: What to keep of each object, from the innermost on, while the file is read; None keeps all.

    Raises:
        BadInputError: If there is no such file, it is not JSON, has none of the formats, or entries that lack fields.
    """
    path = Path(path)
    raw = read_bytes(path)
    try:
        with _without_collection():
            content = json.loads(raw, object_hook=shorten)
    except ValueError as error:
        packed = "; it is an archive: unpack it" if raw[:2] in (b"PK", b"\x1f\x8b") else ""
        raise BadInputError(
            f"{str(path)!r} is not JSON ({error!s:.80}){packed or '; give the file as downloaded'}"
        ) from error
    fitting = next((option for option in formats if option.fits(content)), None)
    if fitting is None:
        wanted = " or ".join(option.name for option in formats)
        other = next((option.name for option in _DECLARED if option.fits(content)), None)
        looks = f"; it looks like {other}, which another argument or data module takes" if other else ""
        raise BadInputError(
            f"{str(path)!r} is not {wanted}: it is {describe(content)}{looks}; give the file as downloaded"
        )
    fitting.check(path, content)
    return Annotations(path, content, fitting, digest(raw))


@contextmanager
def _without_collection() -> Iterator[None]:
    """Nothing read is garbage; looking for some among millions of new objects more than doubles the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        BadInputError: If it is not there, or a folder.
    """
    if not path.is_file():
        what = "is a folder; give the file in it" if path.is_dir() else "does not exist; check the path"
        raise BadInputError(f"the file {str(path)!r} {what}")
    return path.read_bytes()


def read_csv(path: Path, raw: bytes) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of a CSV file; every value is text.

    Raises:
        BadInputError: If it is empty, not UTF-8, names a column twice, or a row has another number of values.
    """
    try:
        lines = csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True)
        names, *rows = [(lines.line_num, line) for line in lines if line] or [(0, [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInputError(f"{str(path)!r} is not CSV in UTF-8 ({error}); save it as that") from error
    header = [name.strip() for name in names[1]]
    if not header or len(set(header)) < len(header):
        raise BadInputError(f"the first line of {str(path)!r} must name its columns, each once; it is {header}")
    for number, line in rows:
        if len(line) != len(header):
            raise BadInputError(
                f"{str(path)!r}, line {number}: {len(line)} values for {len(header)} columns ({', '.join(header)}); "
                "put values that hold commas in quotes"
            )
    return header, [line for _, line in rows]


def digest(raw: bytes) -> str:
    """What identifies a file's bytes."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()[:24]}"


def digest_of(texts: Iterable[str]) -> str:
    """What identifies a list of texts, in their order."""
    return digest("\n".join(texts).encode())


def lists_of(content: Any) -> dict[str, list[dict[str, Any]]]:
    """The non-empty lists of objects that a JSON file is made of."""
    named = content if isinstance(content, dict) else {WHOLE: content}
    return {
        name: value for name, value in named.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    }


def describe(content: Any) -> str:
    """What a JSON file is: its keys, and those of the entries of its lists."""
    found = lists_of(content)
    if WHOLE in found and not isinstance(content, dict):
        return f"a list of objects with {', '.join(found[WHOLE][0])}"
    if not isinstance(content, dict):
        return "an empty list" if content == [] else f"a JSON {type(content).__name__} without objects"
    parts = [f"{key} (each with {', '.join(found[key][0])})" if key in found else key for key in list(content)[:12]]
    return f"an object with {', '.join(parts) or 'nothing'}"


def first_repeated(values: Iterable[Any]) -> Any:
    """The first value that occurred before, or None."""
    seen: set[Any] = set()
    return next((value for value in values if value in seen or seen.add(value)), None)  # type: ignore[func-returns-value]


def _wrong_field(
    path: Path, place: str, entry: Mapping[str, Any], field: str, kinds: tuple[type, ...]
) -> BadInputError:
    if field not in entry:
        return BadInputError(f"{str(path)!r}: {place} has no {field!r}, only {', '.join(entry)}; repair the file")
    wanted = " or ".join(kind.__name__ for kind in kinds)
    value = entry[field]
    return BadInputError(
        f"{str(path)!r}: {place} has {field}={value!r:.60} ({type(value).__name__}), which must be {wanted}; "
        "repair the file"
    )
