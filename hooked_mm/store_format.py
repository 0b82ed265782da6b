"""What an activation store is on disk, so that anyone can write or read one.

    manifest.json                       how it was made; once the run that made it ended, what belongs to it
    shards/NAME/activations.safetensors one tensor per hook, (rows, d)
    shards/NAME/rows.parquet            row -> sample, position, modality, role, word, selector
    shards/NAME/samples.parquet         sample -> its number in the data set, prompt, text, the data set's columns
    shards/NAME/skipped.parquet         samples that could not be used, with the reason

`position` counts a sample's own tokens, padding not among them; a mean over positions has none. All rows of a sample
lie in the shard that lists it. A shard is written aside (its name begins with a dot) and renamed into place, so that it
is there wholly or not at all. Processes write shards of their own; the order of shards means nothing, since every
sample knows its number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hooked_mm.errors import StoreError

FORMAT = 1

SCHEMAS = {
    "rows": pa.schema(
        [
            ("sample", pa.string()),
            ("position", pa.int64()),
            ("modality", pa.string()),
            ("role", pa.string()),
            ("word", pa.string()),
            ("selector", pa.string()),
        ]
    ),
    "samples": pa.schema([("sample", pa.string()), ("sample_number", pa.int64())]),
    "skipped": pa.schema([("sample", pa.string()), ("reason", pa.string())]),
}
"""The columns that a table always has; samples bring more."""

ROW_COLUMNS = tuple(SCHEMAS["rows"].names)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file at one stroke."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(aside, path)


def write_manifest(path: Path, made_by: Mapping[str, Any], files: Mapping[str, int] | None = None) -> None:
    """The manifest of a store; with `files` (name -> bytes) of a complete one."""
    content = {"format": FORMAT, "complete": files is not None, "made_by": dict(made_by)}
    write_json(path / "manifest.json", content if files is None else {**content, "files": dict(files)})


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        StoreError: If there is none, or it can't be read.
    """
    file = path / "manifest.json"
    if not file.is_file():
        raise StoreError(f"{str(path)!r} is not an activation store: it has no manifest.json")
    try:
        manifest = json.loads(file.read_text())
        version = manifest["format"]
        if not {"complete", "made_by"} <= manifest.keys():
            raise KeyError("complete, made_by")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{str(file)!r} is not a store's manifest ({error!r}); write the store again") from error
    if version != FORMAT:
        raise StoreError(f"the store {str(path)!r} has format {version}, this version reads {FORMAT}; update hooked-mm")
    return manifest


def shard_dirs(path: Path) -> list[Path]:
    """The finished shards, by name.

    Raises:
        StoreError: If there is no folder for them.
    """
    folder = path / "shards"
    if not folder.is_dir():
        raise StoreError(f"the store {str(path)!r} has no folder 'shards'; copy it again, whole, or make it again")
    return sorted(shard for shard in folder.iterdir() if not shard.name.startswith("."))


def list_files(path: Path) -> dict[str, int]:
    """Every file of the finished shards and its size in bytes, for the manifest."""
    return {str(f.relative_to(path)): f.stat().st_size for shard in shard_dirs(path) for f in sorted(shard.iterdir())}


def check_files(path: Path, files: Mapping[str, int]) -> None:
    """Notice a store that was copied by half.

    Raises:
        StoreError: It names the first file that is missing or has another size.
    """
    for name, size in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
            raise StoreError(
                f"the store {str(path)!r} is damaged: {name} should have {size} bytes, there is {found}; copy it "
                "again, whole, or make it again"
            )


def read_table(shards: Sequence[Path], name: str, columns: list[str] | None = None) -> pa.Table:
    """A table over all shards; a column that only some of them have is null in the others."""
    tables = [pq.read_table(shard / f"{name}.parquet", columns=columns) for shard in shards]
    schema = SCHEMAS[name]
    empty = schema.empty_table().select([c for c in columns or schema.names if c in schema.names])
    return pa.concat_tables([*tables, empty], promote_options="permissive")


def done(path: Path) -> set[str]:
    """Ids of the samples that finished shards hold or have skipped."""
    shards = shard_dirs(path)
    tables = [read_table(shards, name, ["sample"]) for name in ("samples", "skipped")]
    return {value for table in tables for value in table.column("sample").to_pylist()}
