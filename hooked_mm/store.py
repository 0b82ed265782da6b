"""The activation store: representations on disk, with where each row comes from.

A store is a directory:

    manifest.json                         how it was made; once the run that made it ended, what belongs to it
    shards/00000/activations.safetensors  one tensor per hook, (rows, d)
    shards/00000/rows.parquet             row -> sample, position, modality, role, word
    shards/00000/samples.parquet          sample -> prompt, text and every column the data set brings
    shards/00000/skipped.parquet          samples that could not be used, with the reason

`position` counts a sample's own tokens, padding not among them; a mean over positions has none.

A shard is written aside and renamed into place, so it is there wholly or not at all; a store whose run was cut off
keeps all its finished shards and is continued with `StoreWriter(..., resume=True)`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_mm.errors import StoreError, UnknownHookError, nearest

FORMAT = 1
ROW_COLUMNS = ("sample", "position", "modality", "role", "word")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(aside, path)


class StoreWriter:
    """Writes a store shard by shard.

    Args:
        path: The store's directory; made if needed.
        made_by: What the manifest shall say about its making (model, hooks, selector, seed, ...).
        resume: Go on with an unfinished store of the same making.
        rows_per_shard: A shard is written as soon as it has so many rows,
        seconds_per_shard: or so many seconds after the one before, so that an interruption never costs more.

    Raises:
        StoreError: If the directory holds something else, a finished store, or one made otherwise.
    """

    def __init__(
        self,
        path: str | Path,
        made_by: Mapping[str, Any],
        *,
        resume: bool = False,
        rows_per_shard: int = 65_536,
        seconds_per_shard: float = 300,
    ) -> None:
        self.path, self.rows_per_shard, self.seconds_per_shard = Path(path), rows_per_shard, seconds_per_shard
        self._flushed = time.monotonic()
        self.made_by = json.loads(json.dumps(dict(made_by), default=str))
        self._tensors: dict[str, list[Tensor]] = {}
        self._hooks: set[str] | None = None
        self._rows: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []
        self._skipped: list[dict[str, str]] = []
        shards = self.path / "shards"
        if shards.exists() or (self.path / "manifest.json").exists():
            self._check_resumable(resume)
        elif self.path.exists() and any(self.path.iterdir()):
            raise StoreError(f"{str(self.path)!r} is a folder with other things in it; choose an empty or new one")
        self.path.mkdir(parents=True, exist_ok=True)
        # Before anything else, so that a folder with shards in it always says what it is.
        _write_json(self.path / "manifest.json", {"format": FORMAT, "complete": False, "made_by": self.made_by})
        shards.mkdir(exist_ok=True)
        # What a cut-off run left half-written was never part of the store.
        for leftover in shards.glob(".*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
        self._shard = len(_shard_dirs(self.path))

    def _check_resumable(self, resume: bool) -> None:
        manifest = _read_manifest(self.path)
        if not resume:
            raise StoreError(f"{str(self.path)!r} already holds a store; pass resume=True to go on, or another path")
        if manifest["complete"]:
            raise StoreError(f"the store {str(self.path)!r} is complete; open it, or choose another path")
        old = manifest["made_by"]
        if old != self.made_by:
            changed = sorted(key for key in {*old, *self.made_by} if old.get(key) != self.made_by.get(key))
            raise StoreError(
                f"the store {str(self.path)!r} was made otherwise ({', '.join(changed)} differ), so it can't be "
                "continued; use the same settings or another path"
            )

    def done(self) -> set[str]:
        """Ids of the samples that finished shards already hold or have skipped."""
        shards = _shard_dirs(self.path) if (self.path / "shards").is_dir() else []
        tables = [_read_table(shards, "samples", ["sample"]), _read_table(shards, "skipped", ["sample"])]
        return {value for table in tables for value in table.column("sample").to_pylist()}

    def add(
        self,
        values: Mapping[str, Float[Tensor, "n d"]],
        rows: Sequence[Mapping[str, Any]],
        samples: Sequence[Mapping[str, Any]],
        skipped: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Append rows and their samples; all rows of a sample must come in one call.

        Args:
            values: Per hook (n, d).
            rows: Per row `sample` (id), `position`, `modality`, `role`, `word`.
            samples: Per sample at least `sample` (id); further columns as the data set has them.
            skipped: `sample` and `reason` of samples that could not be used.
        """
        self._check_aligned(values, rows, samples)
        for hook, value in values.items():
            self._tensors.setdefault(hook, []).append(value.detach().cpu())
        self._rows += [{name: row.get(name) for name in ROW_COLUMNS} for row in rows]
        self._samples += [dict(sample) for sample in samples]
        self._skipped += [dict(entry) for entry in skipped]
        late = time.monotonic() - self._flushed > self.seconds_per_shard
        if len(self._rows) >= self.rows_per_shard or late:
            self.flush()

    def _check_aligned(
        self, values: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        for hook, value in values.items():
            if len(value) != len(rows):
                raise StoreError(f"{hook!r} has {len(value)} values for {len(rows)} rows; give one per row")
        if rows and self._hooks is None:
            self._hooks = set(values)
        if rows and (not values or set(values) != self._hooks):
            raise StoreError(f"rows came with values of {sorted(values)}; every row needs {sorted(self._hooks or ())}")
        known = {sample["sample"] for sample in samples}
        lost = next((row["sample"] for row in rows if row["sample"] not in known), None)
        if lost is not None:
            raise StoreError(f"a row belongs to sample {lost!r}, which did not come with it; add both in one call")

    def flush(self) -> None:
        """Write what was added as a shard of its own."""
        if not (self._samples or self._skipped):
            return
        aside = self.path / "shards" / f".{self._shard:05d}"
        aside.mkdir()
        tensors = {hook: torch.cat(values).contiguous() for hook, values in self._tensors.items() if self._rows}
        save_file(tensors, aside / "activations.safetensors")
        pq.write_table(pa.Table.from_pylist(self._rows, schema=_ROW_SCHEMA), aside / "rows.parquet")
        # Samples may bring different columns; what one lacks is null.
        columns = list(dict.fromkeys(["sample", *(name for sample in self._samples for name in sample)]))
        complete = [{name: sample.get(name) for name in columns} for sample in self._samples]
        samples = pa.Table.from_pylist(complete) if complete else _SAMPLE_SCHEMA.empty_table()
        pq.write_table(samples, aside / "samples.parquet")
        pq.write_table(pa.Table.from_pylist(self._skipped, schema=_SKIPPED_SCHEMA), aside / "skipped.parquet")
        os.replace(aside, self.path / "shards" / f"{self._shard:05d}")
        self._shard += 1
        self._tensors, self._rows, self._samples, self._skipped = {}, [], [], []
        self._flushed = time.monotonic()

    def close(self) -> ActivationStore:
        """Write the last shard, mark the store complete and open it."""
        self.flush()
        # What belongs to the store, so that one that was copied by half is noticed.
        files = {
            str(f.relative_to(self.path)): f.stat().st_size for d in _shard_dirs(self.path) for f in sorted(d.iterdir())
        }
        content = {"format": FORMAT, "complete": True, "made_by": self.made_by, "files": files}
        _write_json(self.path / "manifest.json", content)
        return ActivationStore.open(self.path)


_ROW_SCHEMA = pa.schema(
    [
        ("sample", pa.string()),
        ("position", pa.int64()),
        ("modality", pa.string()),
        ("role", pa.string()),
        ("word", pa.string()),
    ]
)
_SAMPLE_SCHEMA = pa.schema([("sample", pa.string())])
_SKIPPED_SCHEMA = pa.schema([("sample", pa.string()), ("reason", pa.string())])


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not file.is_file():
        raise StoreError(f"{str(path)!r} is not an activation store: it has no manifest.json")
    try:
        manifest = json.loads(file.read_text())
        version = manifest["format"]
        if not {"complete", "made_by"} <= manifest.keys():
            raise KeyError("complete, made_by")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{str(file)!r} is not a store's manifest ({error!r}); write the store again") from error
    if version != FORMAT:
        raise StoreError(f"the store {str(path)!r} has format {version}, this version reads {FORMAT}; update hooked-mm")
    return manifest


def _shard_dirs(path: Path) -> list[Path]:
    folder = path / "shards"
    if not folder.is_dir():
        raise StoreError(f"the store {str(path)!r} has no folder 'shards'; copy it again, whole, or make it again")
    return sorted(shard for shard in folder.iterdir() if not shard.name.startswith("."))


def _check_files(path: Path, files: Mapping[str, int]) -> None:
    for name, size in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
            raise StoreError(
                f"the store {str(path)!r} is damaged: {name} should have {size} bytes, there is {found}; copy it "
                "again, whole, or make it again"
            )


def _read_table(shards: list[Path], name: str, columns: list[str] | None = None) -> pa.Table:
    tables = [pq.read_table(shard / f"{name}.parquet", columns=columns) for shard in shards]
    schema = {"rows": _ROW_SCHEMA, "samples": _SAMPLE_SCHEMA, "skipped": _SKIPPED_SCHEMA}[name]
    empty = schema.empty_table().select(columns or schema.names)
    return pa.concat_tables([*tables, empty], promote_options="permissive")


class ActivationStore:
    """A finished store: lazy, memory-mapped activations with tables of rows and samples.

    Attributes:
        path: Its directory.
        made_by: How it was made.
        rows: Table of rows (`sample`, `position`, `modality`, `role`, `word`), in the order of the activations.
        samples: Table of samples; `sample` is the id that `rows` refer to.
        skipped: Table of samples that could not be used, with the reason.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.made_by = path, manifest["made_by"]
        shards = _shard_dirs(path)
        self._files = [shard / "activations.safetensors" for shard in shards]
        self.rows = _read_table(shards, "rows")
        self.samples = _read_table(shards, "samples")
        self.skipped = _read_table(shards, "skipped")
        self.hooks: list[str] = sorted({key for file in self._files for key in _keys(file)})

    @classmethod
    def open(cls, path: str | Path, *, partial: bool = False) -> ActivationStore:
        """Open a store.

        Args:
            path: Its directory.
            partial: Open an unfinished one as far as it goes.

        Raises:
            StoreError: If it is not a store, unfinished, or damaged.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        if not manifest["complete"] and not partial:
            raise StoreError(
                f"the store {str(folder)!r} is unfinished ({len(_shard_dirs(folder))} shards written): run the "
                "extraction again to resume it, or open it with partial=True"
            )
        _check_files(folder, manifest.get("files", {}))
        return cls(folder, manifest)

    @classmethod
    def from_arrays(
        cls,
        path: str | Path,
        values: Mapping[str, Float[Tensor, "n d"] | np.ndarray],
        rows: Sequence[Mapping[str, Any]],
        samples: Sequence[Mapping[str, Any]],
        made_by: Mapping[str, Any],
    ) -> ActivationStore:
        """Write a store from arrays made elsewhere, and open it; see `StoreWriter.add` for the arguments."""
        writer = StoreWriter(path, made_by)
        writer.add({hook: torch.as_tensor(value) for hook, value in values.items()}, rows, samples)
        return writer.close()

    def __len__(self) -> int:
        return self.rows.num_rows

    def __repr__(self) -> str:
        return (
            f"ActivationStore({str(self.path)!r}: {len(self)} rows of {self.samples.num_rows} samples, "
            f"{len(self.hooks)} hooks, {self.skipped.num_rows} skipped)"
        )

    def activations(self, hook: str) -> Float[Tensor, "n d"]:
        """All rows of one hook, (rows, d), in the order of `rows`; read through a memory map.

        Raises:
            UnknownHookError: If the store does not hold the hook.
        """
        if hook not in self.hooks:
            raise UnknownHookError(
                f"the store does not hold {hook!r}{nearest(hook, self.hooks)}; it holds {self.hooks}"
            )
        pieces = []
        for file in self._files:
            with safe_open(file, framework="pt") as tensors:
                if hook in tensors.keys():  # noqa: SIM118  (not a mapping)
                    pieces.append(tensors.get_tensor(hook))
        return torch.cat(pieces)

    def row_samples(self) -> np.ndarray:
        """Per row, the index of its sample in `samples`, (rows,)."""
        index = {sample: number for number, sample in enumerate(self.samples.column("sample").to_pylist())}
        return np.array([index[sample] for sample in self.rows.column("sample").to_pylist()], dtype=np.int64)


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())
