"""The files of a checkpoint one after the other: first what is in them, unread, then their tensors.

`Checkpoint` finds tensors by name and keeps its files open; here all of them are wanted once, so never more than one
file is open, and whatever is wrong with names and sizes is known before any weight takes memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hooked_mm.checkpoint import open_tensors
from hooked_mm.errors import BadInputError


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, unread: where it lies, and its sizes."""

    file: Path
    shape: tuple[int, ...]


def entries(files: Iterable[Path]) -> dict[str, Entry]:
    """Every tensor of the files by name, unread.

    Raises:
        BadInputError: If a file can't be read, or would have to run code, or two hold the same name.
    """
    found: dict[str, Entry] = {}
    for file in files:
        held = open_tensors(file)
        for name in held.keys():  # noqa: SIM118 (no mapping)
            if name in found:
                raise BadInputError(f"both {found[name].file.name} and {file.name} of {file.parent} hold {name!r}")
            if not isinstance(held, dict):
                found[name] = Entry(file, tuple(held.get_slice(name).get_shape()))
            elif isinstance(held[name], Tensor):
                found[name] = Entry(file, tuple(held[name].shape))
            else:
                raise BadInputError(
                    f"{file} is no table of tensors by name: {name!r} is a {type(held[name]).__name__}; it may be the "
                    "state of a training run"
                )
    return found


def tensors(file: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file, each read when its turn comes; the file is let go at the end.

    What comes may be a view of the file: who wants to keep it copies it.

    Args:
        file: Safetensors, or a pickled one.
        names: The tensors wanted; all unless given.

    Raises:
        BadInputError: As `entries`.
    """
    held = open_tensors(file)
    for name in list(held.keys()) if names is None else names:
        yield name, held.pop(name) if isinstance(held, dict) else held.get_tensor(name)
