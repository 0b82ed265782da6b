"""Weight files one at a time: safetensors, or pickled ones of which only tensors are read.

A folder (or a repository of the hub) holds its weights in one file, or in shards that an index names. Names and sizes
are read first, from the files' heads, so that whatever is wrong is said before any weight takes memory; then the
tensors of one file after the other, of which never more than one is open.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.hub_files import fetch

NAMES = (("model.safetensors.index.json", "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
"""What the index of shards and a single file are called; safetensors first."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in the head of a safetensors file."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a weight file, unread.

    Attributes:
        file: Where it lies.
        shape: Its sizes.
        dtype: None for one that torch has under no common name.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None


def weight_files(source: str | Path, revision: str | None = None, **options: Any) -> list[Path]:
    """The files that hold a model's weights, in order.

    Args:
        source: A folder, or `owner/name` on the hub, from which only these files are downloaded.
        revision: Branch, tag or commit on the hub.
        options: As in `hub_files.fetch`.

    Raises:
        BadInputError: If there are none, or an index names a file that is not there.
    """
    options = {"revision": revision, "what": "weights", **options}
    folder = fetch(source, ["*.json"], **options)
    for index, single in NAMES:
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            strange = [name for name in names if Path(name).name != name]
            if strange:
                raise BadInputError(f"{folder / index} names {strange[0]!r}, which is no file of its folder")
            folder = fetch(source, names, **options)
            lost = [name for name in names if not (folder / name).is_file()]
            if lost:
                raise BadInputError(
                    f"{index} of {str(source)!r} names {', '.join(lost)}, which {'is' if len(lost) == 1 else 'are'} "
                    "not there; download the checkpoint again"
                )
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    wanted = [name for pair in NAMES for name in pair]
    if Path(source).is_dir():
        raise BadInputError(f"{str(source)!r} holds no weights: there is no {' or '.join(wanted)}")
    try:
        return [fetch(source, [NAMES[0][1]], **options) / NAMES[0][1]]
    except BadInputError:
        return [fetch(source, [NAMES[1][1]], **options) / NAMES[1][1]]


def entries(files: Iterable[Path]) -> dict[str, Entry]:
    """Every tensor of the files by name, unread.

    Raises:
        BadInputError: If a file can't be read, or two hold the same name.
    """
    found: dict[str, Entry] = {}
    for file in files:
        for name, entry in _head(file).items():
            if name in found:
                raise BadInputError(f"both {found[name].file.name} and {file.name} of {file.parent} hold {name!r}")
            found[name] = entry
    return found


def _head(file: Path) -> dict[str, Entry]:
    if file.suffix != ".safetensors":
        return {name: Entry(file, tuple(value.shape), value.dtype) for name, value in _pickled(file, "meta").items()}
    found = {}
    with _opened(file) as reader:
        for name in reader.keys():  # noqa: SIM118 (no mapping)
            part = reader.get_slice(name)
            found[name] = Entry(file, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
    return found


def tensors(file: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file, each read when its turn comes; the file is let go at the end.

    What comes is a view of the file: who wants to keep it copies it.

    Args:
        file: Safetensors, or anything else for a pickled one.
        names: The tensors wanted; all unless given.

    Raises:
        BadInputError: If the file can't be read, or would have to run code.
    """
    if file.suffix == ".safetensors":
        with _opened(file) as reader:
            for name in reader.keys() if names is None else names:
                yield name, reader.get_tensor(name)
        return
    held = _pickled(file, "cpu")
    for name in list(held) if names is None else names:
        yield name, held.pop(name)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BadInputError(f"{file} can't be read as safetensors ({error}); download it again") from error


def _pickled(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped into memory where its format allows."""
    try:
        try:
            held = torch.load(file, map_location=device, weights_only=True, mmap=True)
        except RuntimeError as error:
            # Files older than torch 1.6 are no zip archives and can't be mapped.
            if "mmap" not in str(error):
                raise
            held = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInputError(
            f"{file} holds more than tensors, and to read the rest would run code that came with it: refused. Ask its "
            "authors for safetensors, or convert it where you trust it: load it there with torch.load, and write "
            "its tensors with safetensors.torch.save_file"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise BadInputError(f"{file} can't be read as weights of torch ({error}); download it again") from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise BadInputError(f"{file} is no table of tensors by name; it may be the state of a training run")
    return held
