"""The activation store: representations on disk, with where each row comes from, opened lazily.

`store_format` documents the files, `store_writer` writes them. Opened, rows stand in the order of the data set, however
many processes wrote them in whatever order, and however often the run was cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from hooked_mm.errors import StoreError, UnknownHookError, nearest, unknown
from hooked_mm.store_format import ROW_COLUMNS, SCHEMAS, check_files, read_manifest, read_table, shard_dirs
from hooked_mm.store_writer import StoreWriter


class ActivationStore:
    """A finished store, or a part of one: memory-mapped activations with tables of rows and samples.

    Attributes:
        path: Its directory.
        made_by: How it was made.
        rows: Table of rows (`sample`, `position`, `modality`, `role`, `word`, `selector`, and where the activations
            lie: `shard`, `row`), in the order of the activations.
        samples: Table of samples; `sample` is the id that `rows` refer to.
        skipped: Table of samples that could not be used, with the reason.
        hooks: What it holds activations of.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        self.path, self.made_by = path, dict(made_by)
        shards = shard_dirs(path)
        self._files = [shard / "activations.safetensors" for shard in shards]
        # Per hook the shape and dtype of a row.
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for file in self._files:
            self._shapes |= _shapes(file)
        self.hooks: list[str] = sorted(self._shapes)
        self.skipped = read_table(shards, "skipped")
        self.samples = read_table(shards, "samples")
        numbers = self.samples.column("sample_number")
        known = not numbers.null_count
        if known:
            self.samples = self.samples.take(np.argsort(numbers.to_numpy(), kind="stable"))
        schema = SCHEMAS["rows"].append(pa.field("shard", pa.int64())).append(pa.field("row", pa.int64()))
        tables = [schema.empty_table()]
        for number, shard in enumerate(shards):
            table = read_table([shard], "rows")
            where = (np.full(len(table), number), np.arange(len(table)))
            tables.append(table.append_column("shard", pa.array(where[0])).append_column("row", pa.array(where[1])))
        rows = pa.concat_tables(tables)
        # Samples without numbers have no order but that of their making, nor have their rows.
        self.rows = rows.take(np.argsort(self._numbers(rows), kind="stable")) if known else rows

    def _numbers(self, rows: pa.Table) -> Int[np.ndarray, " n"]:
        """Per row, the index of its sample in `samples`."""
        numbers = pc.index_in(rows.column("sample"), value_set=self.samples.column("sample").combine_chunks())
        if numbers.null_count:
            lost = rows.column("sample").filter(pc.is_null(numbers))[0]
            raise StoreError(
                f"the store {str(self.path)!r} has a row of sample {str(lost)!r}, which is no sample of it"
            )
        return numbers.to_numpy().astype(np.int64)

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
        manifest = read_manifest(folder)
        if not manifest["complete"] and not partial:
            raise StoreError(
                f"the store {str(folder)!r} is unfinished ({len(shard_dirs(folder))} shards written): run the "
                "extraction again to resume it, or open it with partial=True"
            )
        check_files(folder, manifest.get("files", {}))
        return cls(folder, manifest["made_by"])

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
        writer.close()
        return cls.open(path)

    def __len__(self) -> int:
        return self.rows.num_rows

    def __repr__(self) -> str:
        return (
            f"ActivationStore({str(self.path)!r}: {len(self)} rows of {self.samples.num_rows} samples, "
            f"{len(self.hooks)} hooks, {self.skipped.num_rows} skipped)"
        )

    def where(self, **conditions: Any) -> ActivationStore:
        """The part of the store that meets every condition; nothing is read for it.

        Args:
            conditions: Column of `rows` or of `samples` -> a value, or several of which any will do
                (`word=["red", "blue"]`). In a column of lists (`facts="colour=red"`) any of its items may be it. A
                name that both tables have is the samples'.

        Returns:
            A store with fewer rows. Of `samples` it keeps those that meet the conditions on samples.

        Raises:
            BadInputError: For a column that there is not.
        """
        rows, samples = self.rows, self.samples
        known = list(dict.fromkeys([*ROW_COLUMNS, *samples.column_names]))
        for name, value in conditions.items():
            if name not in known:
                raise unknown("column", name, known)
            if name in samples.column_names:
                samples = samples.filter(_matches(samples.column(name), value))
            else:
                rows = rows.filter(_matches(rows.column(name), value))
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        kept = pc.is_in(rows.column("sample"), value_set=samples.column("sample").combine_chunks())
        part.rows, part.samples = rows.filter(kept), samples
        return part

    def activations(self, hook: str, rows: Int[np.ndarray, " m"] | slice = slice(None)) -> Float[Tensor, "m d"]:
        """Rows of one hook, in the order of `rows`; only what is asked for is read, through a memory map.

        Args:
            hook: One of `hooks`.
            rows: Which of the store's rows, by index; all unless given.

        Raises:
            UnknownHookError: If the store does not hold the hook.
        """
        if hook not in self.hooks:
            raise UnknownHookError(
                f"the store does not hold {hook!r}{nearest(hook, self.hooks)}; it holds {self.hooks}"
            )
        shards, places = (self.rows.column(name).to_numpy()[rows] for name in ("shard", "row"))
        out: Tensor | None = None
        for shard in np.unique(shards):
            chosen = np.flatnonzero(shards == shard)
            with safe_open(self._files[shard], framework="pt") as tensors:
                found = tensors.get_tensor(hook)[torch.from_numpy(places[chosen])]
            if out is None:
                out = found.new_empty(len(shards), *found.shape[1:])
            out[torch.from_numpy(chosen)] = found
        if out is None:
            shape, dtype = self._shapes[hook]
            return torch.empty(0, *shape, dtype=dtype)
        return out

    def batches(
        self, hook: str | Sequence[str], size: int, *, seed: int | None = None
    ) -> Iterator[tuple[Int[np.ndarray, " m"], dict[str, Float[Tensor, "m d"]]]]:
        """Go through the store, which may be larger than memory.

        Args:
            hook: What to read, one or several.
            size: Rows at a time.
            seed: For another order than the store's own.

        Yields:
            Indices into `rows`, and per hook their activations.
        """
        hooks = [hook] if isinstance(hook, str) else list(hook)
        order = np.arange(len(self)) if seed is None else np.random.default_rng(seed).permutation(len(self))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            yield part, {name: self.activations(name, part) for name in hooks}

    def row_samples(self) -> Int[np.ndarray, " n"]:
        """Per row, the index of its sample in `samples`."""
        return self._numbers(self.rows)


def _matches(column: pa.ChunkedArray, value: Any) -> pa.ChunkedArray:
    """Which entries are the value, or one of several."""
    options = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pa.chunked_array([[bool({*options} & {*(entry or ())}) for entry in column.to_pylist()]])
    return pc.is_in(column, value_set=pa.array(options, column.type))


def _shapes(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    with safe_open(file, framework="pt") as tensors:
        first = {hook: tensors.get_slice(hook)[:1] for hook in tensors.keys()}  # noqa: SIM118  (not a mapping)
    return {hook: (tuple(row.shape[1:]), row.dtype) for hook, row in first.items()}
