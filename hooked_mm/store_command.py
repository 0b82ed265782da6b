"""Look into activation stores, check, join and import them (`info`, `verify`, `merge`, `import`)."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jsonargparse import auto_cli
from safetensors import SafetensorError, safe_open

from hooked_mm.errors import StoreError
from hooked_mm.store import ActivationStore
from hooked_mm.store_format import (
    check_files,
    list_files,
    read_manifest,
    read_table,
    shard_dirs,
    write_manifest,
)
from hooked_mm.store_writer import StoreWriter
from hooked_mm.xl_vlms import import_features


def info(path: Path) -> None:
    """Print what a store holds and how it was made; an unfinished one as far as it goes.

    Args:
        path: The store's folder.
    """
    store = ActivationStore.open(path, partial=True)
    complete = read_manifest(path)["complete"]
    size = sum(list_files(path).values())
    print(f"{store}\n{'complete' if complete else 'UNFINISHED'}, {len(shard_dirs(path))} shards, {size / 1e6:,.1f} MB")
    print("\nactivations")
    for hook in store.hooks:
        one = store.activations(hook, slice(0, 1))
        print(
            f"  {hook}: {len(store)} x {' x '.join(map(str, one.shape[1:]))}, {str(one.dtype).removeprefix('torch.')}"
        )
    print("\nrows")
    for column in ("selector", "modality", "role", "word"):
        counts = Counter(store.rows.column(column).to_pylist())
        print(f"  {column}: {', '.join(f'{value} {count}' for value, count in counts.most_common(8))}")
    print(f"\ncolumns of samples\n  {', '.join(store.samples.column_names)}\n\nmade by")
    for name, value in store.made_by.items():
        print(f"  {name}: {value}")
    if store.skipped.num_rows:
        print("\nskipped")
        for reason, count in Counter(store.skipped.column("reason").to_pylist()).most_common(20):
            print(f"  {count} x {reason}")


def faults(path: Path) -> list[str]:
    """Everything that is wrong with a store, by reading all of it.

    Returns:
        One sentence per fault: missing and changed files, tensors and tables that do not fit each other, repeated
        samples, rows of samples that there are not, values that are not finite.

    Raises:
        StoreError: If it is no store at all.
    """
    manifest = read_manifest(path)
    found = []
    if not manifest["complete"]:
        found.append("it is unfinished: run the extraction again with --resume")
    for name, size in manifest.get("files", {}).items():
        try:
            check_files(path, {name: size})
        except StoreError as error:
            found.append(str(error))
    listed = {Path(name).parts[1] for name in manifest.get("files", {})}
    ids: Counter[str] = Counter()
    hooks: set[str] | None = None
    for shard in shard_dirs(path):
        if manifest["complete"] and shard.name not in listed:
            found.append(f"{shard.name}: the manifest does not know this shard")
        try:
            tables = {name: read_table([shard], name) for name in ("rows", "samples", "skipped")}
        except (OSError, pa.ArrowException) as error:
            found.append(f"{shard.name}: a table can't be read ({error})")
            continue
        own = tables["samples"].column("sample").to_pylist()
        ids.update(own)
        ids.update(tables["skipped"].column("sample").to_pylist())
        lost = set(tables["rows"].column("sample").to_pylist()) - set(own)
        if lost:
            found.append(f"{shard.name}: {len(lost)} samples have rows but stand in no table of samples: {min(lost)!r}")
        try:
            with safe_open(shard / "activations.safetensors", framework="pt") as tensors:
                names = set(tensors.keys())
                for hook in sorted(names):
                    value = tensors.get_tensor(hook)
                    if len(value) != tables["rows"].num_rows:
                        found.append(f"{shard.name}: {hook} has {len(value)} rows, the table {tables['rows'].num_rows}")
                    bad = int((~torch.isfinite(value)).any(dim=-1).sum()) if value.is_floating_point() else 0
                    if bad:
                        found.append(f"{shard.name}: {hook} has {bad} rows with values that are not finite")
        except (OSError, SafetensorError) as error:
            found.append(f"{shard.name}: the activations can't be read ({error})")
            continue
        if tables["rows"].num_rows:
            if hooks is not None and names != hooks:
                found.append(f"{shard.name}: holds {sorted(names)}, other shards {sorted(hooks)}")
            hooks = hooks or names
    repeated = [name for name, count in ids.items() if count > 1]
    if repeated:
        found.append(f"{len(repeated)} samples stand in the store more than once, as {min(repeated)!r}")
    return found


def verify(path: Path) -> None:
    """Read all of a store and print what is wrong with it; the exit status tells whether anything is.

    Args:
        path: The store's folder.
    """
    found = faults(path)
    for fault in found:
        print(fault)
    if found:
        sys.exit(1)
    print(f"{ActivationStore.open(path)}: whole")


def merge(output: Path, parts: list[Path]) -> None:
    """Make one store of several that were made alike from different samples, in the order given.

    Files are linked where the file system can, else copied; the parts stay as they are.

    Args:
        output: A new folder.
        parts: Complete stores; they may differ in their data and in nothing else.
    """
    if len(parts) < 2:
        raise StoreError(f"merging takes at least two stores; got {len(parts)}")
    stores = [ActivationStore.open(part) for part in parts]
    first: dict[str, Any] = {k: v for k, v in stores[0].made_by.items() if k != "data"}
    seen: dict[str, Path] = {}
    for part, store in zip(parts, stores, strict=True):
        other = {k: v for k, v in store.made_by.items() if k != "data"}
        changed = sorted(key for key in {*first, *other} if first.get(key) != other.get(key))
        if changed or store.hooks != stores[0].hooks:
            what = ", ".join(changed) or "hooks"
            raise StoreError(f"{str(part)!r} was made otherwise than {str(parts[0])!r} ({what} differ); merge others")
        for name in [*store.samples.column("sample").to_pylist(), *store.skipped.column("sample").to_pylist()]:
            if name in seen:
                raise StoreError(f"sample {name!r} is in {str(seen[name])!r} and in {str(part)!r}; merge others")
            seen[name] = part
    made_by = {**first, "data": {"merged": [store.made_by.get("data") for store in stores]}}
    writer = StoreWriter(output, made_by)
    start = 0
    for number, (part, store) in enumerate(zip(parts, stores, strict=True)):
        for shard in shard_dirs(part):
            aside = output / "shards" / f".{number:03d}-{shard.name}"
            aside.mkdir()
            for file in shard.iterdir():
                if file.name == "samples.parquet":
                    pq.write_table(_renumbered(read_table([shard], "samples"), start), aside / file.name)
                else:
                    _link(file, aside / file.name)
            os.replace(aside, aside.with_name(aside.name[1:]))
        start += 1 + max(store.samples.column("sample_number").drop_null().to_pylist(), default=-1)
    write_manifest(output, made_by, list_files(output))
    writer.release()
    print(ActivationStore.open(output))


def _renumbered(samples: pa.Table, start: int) -> pa.Table:
    """Numbers that go on behind those of the stores before."""
    place = samples.column_names.index("sample_number")
    moved = pa.array(
        [None if n is None else n + start for n in samples.column("sample_number").to_pylist()], pa.int64()
    )
    return samples.set_column(place, "sample_number", moved)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def import_file(output: Path, file: Path, names: dict[str, str] | None = None) -> None:
    """Make a store of a `.pth` file of features that XL-VLMs saved.

    Args:
        output: The store's folder.
        file: What XL-VLMs saved; nothing in it is run.
        names: Module name -> hook name, for modules other than blocks of the language model.
    """
    print(import_features(file, output, names=names))


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm store`."""
    auto_cli(
        {"info": info, "verify": verify, "merge": merge, "import": import_file},
        args=None if argv is None else list(argv),
        prog="hooked-mm store",
    )
