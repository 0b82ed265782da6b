"""Writing an activation store: shards that appear whole or not at all, by one process or many, resumed after any kill.

The first process (rank 0) begins and ends a store; every process writes shards under names of its own. While it is
written, a lock keeps other runs away; the system lifts it when the process that holds it is gone, however it went.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from hooked_mm.errors import StoreError
from hooked_mm.store_format import (
    ROW_COLUMNS,
    SCHEMAS,
    done,
    list_files,
    read_manifest,
    shard_dirs,
    write_manifest,
)

LOCK = ".lock"
LOG = "log"
"""Folder in a store for the scalars of the run that makes it."""


class StoreWriter:
    """Writes a store shard by shard; a shard is written as soon as any of its limits is reached.

    Args:
        path: The store's directory; made if needed.
        made_by: What the manifest shall say about its making (model, hooks, selector, seed, ...). Other processes
            than the first give what they like: only the first writes it down.
        resume: Go on with an unfinished store of the same making.
        rank: Which of the processes that write this store this is. The first, 0, must have made its writer before
            others make theirs.
        rows_per_shard: At most so many rows, but all of a sample's stay together.
        megabytes_per_shard: About so many; twice as much is held in memory at most.
        seconds_per_shard: After so many seconds, so that an interruption never costs more.

    Raises:
        StoreError: If the directory holds something else, a finished store, one made otherwise, or one that another
            run is writing.
    """

    def __init__(
        self,
        path: str | Path,
        made_by: Mapping[str, Any],
        *,
        resume: bool = False,
        rank: int = 0,
        rows_per_shard: int = 65_536,
        megabytes_per_shard: float = 256,
        seconds_per_shard: float = 300,
    ) -> None:
        self.path, self.rank = Path(path), rank
        self.rows_per_shard, self.seconds_per_shard = rows_per_shard, seconds_per_shard
        self.bytes_per_shard = megabytes_per_shard * 1e6
        self.made_by = json.loads(json.dumps(dict(made_by), default=str))
        self._hooks: set[str] | None = None
        self._empty()
        if not rank:
            self._begin(resume)
        own = [shard.name for shard in shard_dirs(self.path) if shard.name.startswith(f"{rank:03d}-")]
        self._next = int(own[-1].partition("-")[2]) + 1 if own else 0

    def _begin(self, resume: bool) -> None:
        shards, manifest = self.path / "shards", self.path / "manifest.json"
        old = shards.exists() or manifest.exists()
        if not old and self.path.exists() and any(file.name not in (LOCK, LOG) for file in self.path.iterdir()):
            raise StoreError(f"{str(self.path)!r} is a folder with other things in it; choose an empty or new one")
        if old and read_manifest(self.path)["complete"]:
            remedy = "open it, or choose another path"
            raise StoreError(f"{str(self.path)!r} already holds a store, which is complete; {remedy}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(
                f"the store {str(self.path)!r} is being written by another run; wait for its end, or stop it"
            ) from error
        if old:
            try:
                self._check_resumable(resume)
            except StoreError:
                self.release()
                raise
        # Before anything else, so that a folder with shards in it always says what it is.
        write_manifest(self.path, self.made_by)
        shards.mkdir(exist_ok=True)
        # What a cut-off run left half-written was never part of the store.
        for leftover in shards.glob(".*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)

    def _check_resumable(self, resume: bool) -> None:
        manifest = read_manifest(self.path)
        if not resume:
            raise StoreError(f"{str(self.path)!r} already holds a store; pass resume=True to go on, or another path")
        old = manifest["made_by"]
        if old != self.made_by:
            changed = sorted(key for key in {*old, *self.made_by} if old.get(key) != self.made_by.get(key))
            raise StoreError(
                f"the store {str(self.path)!r} was made otherwise ({', '.join(changed)} differ), so it can't be "
                "continued; use the same settings or another path"
            )

    def done(self) -> set[str]:
        """Ids of the samples that finished shards, of all processes, already hold or have skipped."""
        return done(self.path)

    def _empty(self) -> None:
        self._tensors: dict[str, list[Tensor]] = {}
        self._rows: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []
        self._skipped: list[dict[str, str]] = []
        self._bytes, self._since = 0, time.monotonic()

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
            rows: Per row `sample` (id), `position`, `modality`, `role`, `word`, `selector`.
            samples: Per sample at least `sample` (id) and, where the order of samples shall not depend on who wrote
                them when, `sample_number`; further columns as the data set has them.
            skipped: `sample` and `reason` of samples that could not be used.
        """
        self._check_aligned(values, rows, samples)
        for hook, value in values.items():
            # A copy, since a row of a view would keep all of what it is a view of.
            self._tensors.setdefault(hook, []).append(value.detach().to("cpu", copy=True))
            self._bytes += value.nbytes
        self._rows += [{name: row.get(name) for name in ROW_COLUMNS} for row in rows]
        self._samples += [dict(sample) for sample in samples]
        self._skipped += [dict(entry) for entry in skipped]
        late = time.monotonic() - self._since > self.seconds_per_shard
        if len(self._rows) >= self.rows_per_shard or self._bytes >= self.bytes_per_shard or late:
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
        name = f"{self.rank:03d}-{self._next:05d}"
        aside = self.path / "shards" / f".{name}"
        aside.mkdir()
        tensors = {hook: torch.cat(values).contiguous() for hook, values in self._tensors.items() if self._rows}
        save_file(tensors, aside / "activations.safetensors")
        # Samples may bring different columns; what one lacks is null.
        columns = dict.fromkeys(["sample", *(column for sample in self._samples for column in sample)])
        complete = [{column: sample.get(column) for column in columns} for sample in self._samples]
        tables = {
            "rows": pa.Table.from_pylist(self._rows, schema=SCHEMAS["rows"]),
            "samples": pa.Table.from_pylist(complete) if complete else SCHEMAS["samples"].empty_table(),
            "skipped": pa.Table.from_pylist(self._skipped, schema=SCHEMAS["skipped"]),
        }
        for what, table in tables.items():
            pq.write_table(table, aside / f"{what}.parquet")
        # A shard that has its name must be on the disk even if the machine stops now.
        for file in (*aside.iterdir(), aside):
            _sync(file)
        os.replace(aside, aside.with_name(name))
        _sync(aside.parent)
        self._next += 1
        self._empty()

    def release(self) -> None:
        """Let other runs go on with the store; what was added and not written is lost."""
        if not self.rank:
            self._lock.release()

    def close(self) -> None:
        """Write the last shard; as the first process mark the store complete, for which all others must have closed."""
        self.flush()
        if self.rank:
            return
        # What belongs to the store, so that one that was copied by half is noticed.
        write_manifest(self.path, self.made_by, list_files(self.path))
        self.release()
        (self.path / LOCK).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
