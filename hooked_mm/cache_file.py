"""One file for one `ActivationCache`: a safetensors file whose header carries a JSON description.

    values/{hook name}     the activations; a name for the same memory as another is kept as an alias, not twice
    batch/...              every tensor of the batch
    header "hooked_mm"     JSON: format, package versions, model, aliases, hook points, the batch without its tensors

The file is written aside and renamed, so it is there wholly or not at all. Nothing is pickled; loading runs no code
that the file brings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, StoreError
from hooked_mm.hook_points import HookPoint
from hooked_mm.layout import ImageLayout, Layout

FORMAT = 1
PACKAGES = ("hooked-mm", "torch", "transformers", "safetensors")
CLASSES: dict[str, type] = {"Batch": Batch, "Layout": Layout, "ImageLayout": ImageLayout}
"""What a batch is made of; a file's header can name no other class."""
_KEY = "hooked_mm"


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON tree for a value; its tensors go into `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Enum):
        return _encode(value.value, path, tensors)
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, f"{path}/{number}", tensors) for number, item in enumerate(value)]}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _encode(item, f"{path}/{key}", tensors) for key, item in value.items()}}
    name = type(value).__name__
    if is_dataclass(value) and CLASSES.get(name) is type(value):
        content = {field.name: getattr(value, field.name) for field in fields(value)}
        return {"class": name, "fields": _encode(content, path, tensors)["dict"]}
    raise BadInputError(
        f"{path} is a {name}, which a cache file can't hold; a batch holds tensors, numbers, strings, lists, mappings "
        "and {', '.join(CLASSES)}"
    )


def _decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "list" in tree:
        return [_decode(item, tensors) for item in tree["list"]]
    if "tuple" in tree:
        return tuple(_decode(item, tensors) for item in tree["tuple"])
    if "dict" in tree:
        return {key: _decode(item, tensors) for key, item in tree["dict"].items()}
    made = CLASSES.get(tree["class"])
    if made is None:
        raise TypeError(f"{tree['class']!r} is not a class of a batch")
    return made(**{key: _decode(item, tensors) for key, item in tree["fields"].items()})


def _one_name_per_memory(values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that safetensors takes (no two share memory), and which names mean one that is kept under another."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, value in values.items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        dense = value.detach().contiguous()
        storage = dense.untyped_storage()
        shared = storage.data_ptr() in storages or storage.nbytes() != dense.nbytes
        storages.add(storage.data_ptr())
        kept[name] = dense.clone() if shared else dense
    return kept, aliases


def save_cache(
    path: str | Path,
    values: Mapping[str, Tensor],
    batch: Batch,
    points: Mapping[str, HookPoint],
    model: Mapping[str, Any] | None,
) -> Path:
    """Write a cache's content to one file, over an older one of that name; its path.

    Args:
        path: The file; its folder is made if needed.
        values: Activations by hook name.
        batch: What they belong to.
        points: All hook points of the model.
        model: What tells the model from others; None if it is not known.

    Raises:
        BadInputError: If the path is a folder, or the batch holds what a file can't.
    """
    target = Path(path)
    if target.is_dir():
        raise BadInputError(f"{str(target)!r} is a folder; give the name of a file, as in 'run.safetensors'")
    found: dict[str, Tensor] = {f"values/{name}": value for name, value in values.items()}
    tree = _encode(batch, "batch", found)
    tensors, aliases = _one_name_per_memory(found)
    plain = (str, int, float, type(None))
    described = {
        "format": FORMAT,
        "packages": {package: version(package) for package in PACKAGES},
        "model": model,
        "values": list(values),
        "aliases": aliases,
        "points": [
            {f.name: v for f in fields(point) if isinstance(v := getattr(point, f.name), plain)}
            for point in points.values()
        ],
        "batch": tree,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, aside, metadata={_KEY: json.dumps(described)})
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def load_cache(
    path: str | Path, device: str = "cpu"
) -> tuple[dict[str, Tensor], Batch, dict[str, HookPoint], dict[str, Any]]:
    """Read a file of `save_cache`: values, batch, hook points, and the description.

    Raises:
        StoreError: If the file is missing, damaged, of another kind or of another version.
    """
    file = Path(path)
    if not file.is_file():
        raise StoreError(f"there is no file {str(file)!r}; check the path")
    try:
        with safe_open(file, framework="pt", device=device) as opened:
            described = json.loads((opened.metadata() or {}).get(_KEY, "null"))
            tensors = {key: opened.get_tensor(key) for key in opened.keys()} if described else {}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise StoreError(f"{str(file)!r} is damaged or no safetensors file ({error}); save the cache again") from error
    if not isinstance(described, dict) or "format" not in described:
        raise StoreError(f"{str(file)!r} is a safetensors file, but not of an ActivationCache; use cache.save(path)")
    if described["format"] != FORMAT:
        raise StoreError(
            f"{str(file)!r} has format {described['format']}, this version reads {FORMAT}; update hooked-mm"
        )
    try:
        tensors |= {name: tensors[kept] for name, kept in described["aliases"].items()}
        values = {name: tensors[f"values/{name}"] for name in described["values"]}
        points = {point["name"]: HookPoint(**point) for point in described["points"]}
        batch = _decode(described["batch"], tensors)
        if not isinstance(batch, Batch):
            raise TypeError("its batch is not a Batch")
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{str(file)!r} does not hold what its header says ({error!r}), or was written by a version of other hook "
            f"points ({described.get('packages')}); save the cache again"
        ) from error
    return values, batch, points, described
