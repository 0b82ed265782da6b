"""A folder with tensors and their story: `NAME.safetensors` plus `NAME.json`, never a pickle.

Both files are replaced at one stroke each, the JSON last; it holds the checksum of the other, so that tensors that are
not those the JSON speaks of (a save that was killed, a copy by half) are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from hooked_mm.errors import BadInputError

FOREIGN = {
    ".pth": "a pickle of PyTorch",
    ".pt": "a pickle of PyTorch",
    ".bin": "a pickle of PyTorch",
    ".ckpt": "a pickle of PyTorch",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".joblib": "a pickle of scikit-learn",
    ".npz": "NumPy arrays",
    ".npy": "NumPy arrays",
    ".h5": "HDF5",
    ".gguf": "GGUF",
    ".onnx": "ONNX",
    ".safetensors": "tensors without our {json}",
}
"""What else people save such things as."""


def write_folder(path: str | Path, name: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Path:
    """Write both files into a folder, made if needed; the folder.

    Args:
        path: The folder.
        name: Of both files, without their endings.
        tensors: What `NAME.safetensors` shall hold.
        content: What `NAME.json` shall say; the checksum is added as `sha256`.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    written = save({key: value.detach().contiguous().cpu() for key, value in tensors.items()})
    # Before anything is replaced, so that content that is no JSON leaves the folder as it was.
    told = json.dumps({**content, "sha256": hashlib.sha256(written).hexdigest()}, indent=2) + "\n"
    _replace(folder / f"{name}.safetensors", written)
    _replace(folder / f"{name}.json", told.encode())
    return folder


def read_json(path: str | Path, name: str, what: str, remedy: str) -> dict[str, Any]:
    """The content of `NAME.json`.

    Args:
        path: The folder.
        name: Of both files, without their endings.
        what: What the folder should hold, for errors: "concept dictionary".
        remedy: How to come from a foreign format to ours, for errors.

    Raises:
        BadInputError: If the folder holds nothing of the kind (it says what it holds instead), or it can't be read.
    """
    folder = Path(path)
    file = folder / f"{name}.json"
    if not file.is_file():
        found = _foreign(folder, file.name, remedy)
        raise BadInputError(f"{str(path)!r} holds no {what}: there is no {file.name}{found}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{str(file)!r} is no JSON ({error}); save the {what} again") from error
    if not isinstance(content, dict):
        raise BadInputError(f"{str(file)!r} holds a {type(content).__name__}, which is no {what}; save it again")
    return content


def read_tensors(path: str | Path, name: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of `NAME.safetensors`, on the CPU.

    Args:
        path: The folder.
        name: Of both files, without their endings.
        content: Of `NAME.json`, for the checksum.

    Raises:
        BadInputError: If the file is missing, or not the one that the JSON speaks of.
    """
    file = Path(path) / f"{name}.safetensors"
    written = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(written).hexdigest() != content.get("sha256"):
        raise BadInputError(
            f"{str(file)!r} is not the file that {name}.json speaks of{'' if written else ' (it is missing)'}: the "
            "folder was saved or copied by half, do it again"
        )
    return load(written)


def _replace(path: Path, content: bytes) -> None:
    """Put a file into its place at one stroke."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(content)
    os.replace(aside, path)


def _foreign(folder: Path, json_name: str, remedy: str) -> str:
    """What the path holds instead, by name; or what is close by."""
    files = [folder] if folder.is_file() else sorted(folder.iterdir()) if folder.is_dir() else []
    for file in files:
        kind = FOREIGN.get(file.suffix.lower(), "").format(json=json_name)
        if kind:
            return f"; {file.name!r} is {kind}, which is not read: {remedy}"
    return ""
