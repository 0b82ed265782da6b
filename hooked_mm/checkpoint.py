"""The files of a checkpoint: which tensor lies where, read one by one, and how many bytes that took.

A checkpoint is one safetensors file, or several shards with an index; older ones are PyTorch's `.bin`, which are read
by `torch.load(weights_only=True)` and mapped into memory, so that only what is asked for is read of them, too. On the
hub only the index and the files that are asked for are downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import hooked_mm.molmo  # noqa: F401  (makes transformers' Auto classes know it, wherever files are loaded)
from hooked_mm.errors import BadInputError
from hooked_mm.hub_files import fetch

NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""In the order that transformers looks for them."""


class Checkpoint:
    """A checkpoint's tensors by name; nothing is read before it is asked for.

    Args:
        path_or_repo: Hub id or folder.
        subfolder: Where in it the files lie.
        options: Where on the hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Attributes:
        opened: The files that tensors were asked of, in that order.

    Raises:
        BadInputError: If there are no weights.
    """

    def __init__(self, path_or_repo: str | Path, *, subfolder: str = "", **options: Any) -> None:
        self.where, self._prefix = str(path_or_repo), f"{subfolder}/" if subfolder else ""
        self._options = options
        self._files: dict[str, Any] = {}
        self._known: dict[str, set[str]] = {}
        self._read: dict[str, int] = {}
        why = None
        for name in NAMES:
            try:
                self._main = self._path(name)
                break
            except BadInputError as error:
                why = error
        else:
            raise BadInputError(f"{self.where!r} holds no weights that can be read in parts: {why}") from why

    def _path(self, name: str) -> Path:
        """A file of the checkpoint, downloaded if need be."""
        folder = fetch(self.where, [f"{self._prefix}{name}"], what="weights", **self._options)
        found = folder / f"{self._prefix}{name}"
        if not found.is_file():
            raise BadInputError(f"{self.where!r} lacks the file {name!r}")
        return found

    @cached_property
    def _index(self) -> dict[str, Any]:
        """The index of a checkpoint of several files; of one file, the like of it."""
        if self._main.suffix == ".json":
            try:
                found: dict[str, Any] = json.loads(self._main.read_text(encoding="utf-8"))
                assert isinstance(found["weight_map"], dict)
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AssertionError, TypeError) as error:
                raise BadInputError(f"{str(self._main)!r} is no index of a checkpoint: {error!r}") from error
            return found
        return {"weight_map": dict.fromkeys(self._names(self._main.name), self._main.name)}

    @property
    def shards(self) -> dict[str, str]:
        """Tensor -> the file that holds it."""
        found: dict[str, str] = self._index["weight_map"]
        return found

    @property
    def files(self) -> list[Path]:
        """Every file that holds tensors, downloaded if need be."""
        return [self._path(name) for name in sorted(set(self.shards.values()))]

    @property
    def total_bytes(self) -> int | None:
        """Of all tensors; None where an index does not say."""
        if self._main.suffix != ".json":
            return self._main.stat().st_size
        size = (self._index.get("metadata") or {}).get("total_size")
        return None if size is None else int(size)

    @property
    def opened(self) -> tuple[str, ...]:
        """The files that tensors were asked of."""
        return tuple(dict.fromkeys(self.shards[name] for name in self._read))

    @property
    def names_read(self) -> tuple[str, ...]:
        """The tensors that were asked for."""
        return tuple(self._read)

    @property
    def bytes_read(self) -> int:
        """Of the tensors that were asked for, as they are stored."""
        return sum(self._read.values())

    def _open(self, name: str) -> Any:
        """A file's tensors by name, not read yet."""
        if name not in self._files:
            self._files[name] = open_tensors(self._path(name))
        return self._files[name]

    def _names(self, name: str) -> set[str]:
        """Of a file's tensors."""
        if name not in self._known:
            self._known[name] = set(self._open(name).keys())
        return self._known[name]

    def lazy(self, names: Iterable[str]) -> dict[str, Any]:
        """Tensors that are read when they are indexed (`[...]`), as transformers' loading does; counted as read.

        Raises:
            BadInputError: If a file is missing or broken, or lacks a tensor that the index names.
        """
        found = {name: self._tensor(name) for name in names}
        self._read |= {name: _size(value) for name, value in found.items()}
        return found

    def _tensor(self, name: str) -> Any:
        shard = self.shards[name]
        file = self._open(shard)
        if name not in self._names(shard):
            raise BadInputError(f"{shard!r} lacks the tensor {name!r}, which the index of {self.where!r} says it holds")
        return file[name] if isinstance(file, dict) else file.get_slice(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, as it is stored."""
        return _dtype(self._tensor(name))

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own."""
        value: Tensor = self.lazy([name])[name][...]
        return value.clone()


def open_tensors(path: Path) -> Any:
    """A file's tensors by name, not read yet: `keys()`, and `get_slice(name)` or `[name]`.

    Raises:
        BadInputError: If it is no file of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        # Files of PyTorch before 1.6 can't be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except UnpicklingError as error:
        raise BadInputError(
            f"{str(path)!r} is no file of tensors alone: to read the rest would run code that came with it, so it is "
            "refused. Ask its authors for safetensors; or, where you trust it, load it with torch.load and write its "
            "tensors with safetensors.torch.save_file"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise BadInputError(f"{str(path)!r} is no file of tensors: {str(error).splitlines()[0]}") from error


def _shape(value: Any) -> list[int]:
    return list(value.shape) if isinstance(value, Tensor) else value.get_shape()


def _dtype(value: Any) -> torch.dtype:
    # No element of it is read.
    found: torch.dtype = (value[0:0] if _shape(value) else value[...]).dtype
    return found


def _size(value: Any) -> int:
    """Bytes of a tensor, or of one that is not read yet."""
    return prod(_shape(value)) * _dtype(value).itemsize


def settled_dtype(checkpoint: Checkpoint, config: Any, dtype: str | torch.dtype) -> torch.dtype:
    """The dtype that a model shall have; of `"auto"` the configuration's, else that of the first weights.

    Raises:
        BadInputError: If there is no dtype of that name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise BadInputError(
                f"dtype={dtype!r} is none of PyTorch's; give 'auto', 'float32', 'bfloat16' or 'float16'"
            )
        return found
    named = getattr(config, "dtype", None)
    if named is not None:
        return named if isinstance(named, torch.dtype) else settled_dtype(checkpoint, config, str(named))
    kinds = (checkpoint.dtype(name) for name in checkpoint.shards)
    return next((kind for kind in kinds if kind.is_floating_point), torch.get_default_dtype())


def adapter_tensors(adapter: str | Path, **options: Any) -> list[str]:
    """Names of the tensors of a PEFT adapter, of a folder or the hub."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        try:
            path = fetch(adapter, [name], what="adapter", **options) / name
        except BadInputError:
            continue
        if path.is_file():
            return sorted(open_tensors(path).keys())
    raise BadInputError(f"{str(adapter)!r} holds no PEFT adapter: there is no adapter_model.safetensors")
