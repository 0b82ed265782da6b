"""The activation store: representations on disk, with where each row comes from.

A store is a directory:

    manifest.json                      how it was made; `complete` says whether the run that made it ended
    parts/00000/activations.safetensors  one tensor per hook, (rows, d)
    parts/00000/rows.parquet           row -> sample, position, modality, role, word
    parts/00000/samples.parquet        sample -> prompt, text and every column the data set brings
    parts/00000/skipped.parquet        samples that could not be used, with the reason

A part is written aside and renamed into place, so it is there wholly or not at all; a store whose run was cut off keeps
all its finished parts and is continued with `StoreWriter(..., resume=True)`.
"""

from __future__ import annotations

import json
import os
import shutil
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
    """Writes a store part by part.

    Args:
        path: The store's directory; made if needed.
        made_by: What the manifest shall say about its making (model, hooks, selector, seed, ...).
        resume: Go on with an unfinished store of the same making.
        rows_per_part: A part is written as soon as it has so many rows.

    Raises:
        StoreError: If the directory holds something else, a finished store, or one made otherwise.
    """

    def __init__(
        self, path: str | Path, made_by: Mapping[str, Any], *, resume: bool = False, rows_per_part: int = 65_536
    ) -> None:
        self.path, self.rows_per_part = Path(path), rows_per_part
        self.made_by = json.loads(json.dumps(dict(made_by), default=str))
        self._tensors: dict[str, list[Tensor]] = {}
        self._rows: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []
        self._skipped: list[dict[str, str]] = []
        parts = self.path / "parts"
        if parts.exists() or (self.path / "manifest.json").exists():
            self._check_resumable(resume)
        elif self.path.exists() and any(self.path.iterdir()):
            raise StoreError(f"{str(self.path)!r} is a folder with other things in it; choose an empty or new one")
        parts.mkdir(parents=True, exist_ok=True)
        # What a cut-off run left half-written was never part of the store.
        for leftover in parts.glob(".*"):
            shutil.rmtree(leftover)
        self._part = len(list(parts.iterdir()))
        _write_json(self.path / "manifest.json", {"format": FORMAT, "complete": False, "made_by": self.made_by})

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
        """Ids of the samples that finished parts already hold or have skipped."""
        parts = _part_dirs(self.path)
        tables = [_read_table(parts, "samples", ["sample"]), _read_table(parts, "skipped", ["sample"])]
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
        for hook, value in values.items():
            if len(value) != len(rows):
                raise StoreError(f"{hook!r} has {len(value)} values for {len(rows)} rows; give one per row")
            self._tensors.setdefault(hook, []).append(value.detach().cpu())
        self._rows += [{name: row.get(name) for name in ROW_COLUMNS} for row in rows]
        self._samples += [dict(sample) for sample in samples]
        self._skipped += [dict(entry) for entry in skipped]
        if len(self._rows) >= self.rows_per_part:
            self.flush()

    def flush(self) -> None:
        """Write what was added as a part of its own."""
        if not (self._samples or self._skipped):
            return
        aside = self.path / "parts" / f".{self._part:05d}"
        aside.mkdir()
        tensors = {hook: torch.cat(values).contiguous() for hook, values in self._tensors.items()}
        save_file(tensors, aside / "activations.safetensors")
        pq.write_table(pa.Table.from_pylist(self._rows, schema=_ROW_SCHEMA), aside / "rows.parquet")
        samples = (
            pa.Table.from_pylist(self._samples) if self._samples else pa.table({"sample": pa.array([], pa.string())})
        )
        pq.write_table(samples, aside / "samples.parquet")
        pq.write_table(pa.Table.from_pylist(self._skipped, schema=_SKIPPED_SCHEMA), aside / "skipped.parquet")
        os.replace(aside, self.path / "parts" / f"{self._part:05d}")
        self._part += 1
        self._tensors, self._rows, self._samples, self._skipped = {}, [], [], []

    def close(self) -> ActivationStore:
        """Write the last part, mark the store complete and open it."""
        self.flush()
        _write_json(self.path / "manifest.json", {"format": FORMAT, "complete": True, "made_by": self.made_by})
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


def _part_dirs(path: Path) -> list[Path]:
    return sorted(part for part in (path / "parts").iterdir() if not part.name.startswith("."))


def _read_table(parts: list[Path], name: str, columns: list[str] | None = None) -> pa.Table:
    tables = [pq.read_table(part / f"{name}.parquet", columns=columns) for part in parts]
    return (
        pa.concat_tables(tables, promote_options="permissive")
        if tables
        else pa.table({"sample": pa.array([], pa.string())})
    )


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
        parts = _part_dirs(path)
        self._files = [part / "activations.safetensors" for part in parts]
        self.rows = _read_table(parts, "rows")
        self.samples = _read_table(parts, "samples")
        self.skipped = _read_table(parts, "skipped")
        self.hooks: list[str] = sorted({key for file in self._files for key in _keys(file)})

    @classmethod
    def open(cls, path: str | Path, *, partial: bool = False) -> ActivationStore:
        """Open a store.

        Args:
            path: Its directory.
            partial: Open an unfinished one as far as it goes.

        Raises:
            StoreError: If it is not a store, or unfinished.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        if not manifest["complete"] and not partial:
            raise StoreError(
                f"the store {str(folder)!r} is unfinished ({len(_part_dirs(folder))} parts written): run the "
                "extraction again to resume it, or open it with partial=True"
            )
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
