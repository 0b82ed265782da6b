"""Features that XL-VLMs saved (`*.pth`), as an activation store.

Such a file is a dictionary of lists with one entry per sample: `hidden_states` (module name -> (1, positions, d)),
`image`, `model_predictions`, and `token_of_interest_mask`, false where the word was not found: there it holds the first
position of the sample instead, which is left out here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hooked_mm.errors import StoreError
from hooked_mm.store import ActivationStore
from hooked_mm.store_writer import StoreWriter

BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)$")
TOWERS = ("vision", "visual", "image")


def hook_name(module: str) -> str:
    """The hook point whose values a module of theirs gives: a block of the language model gives its `resid_post`.

    Raises:
        StoreError: For any other module.
    """
    found = BLOCK.search(module)
    if found is None or any(tower in module for tower in TOWERS):
        raise StoreError(
            f"{module!r} is not a block of a language model, as 'language_model.model.layers.31' is; say what to call "
            f"it: names={{{module!r}: 'blocks.31.hook_resid_post'}}"
        )
    return f"blocks.{found[1]}.hook_resid_post"


def import_features(
    source: str | Path,
    output: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> ActivationStore:
    """Make a store of a file that XL-VLMs saved; every position in it becomes a row.

    Args:
        source: The `.pth` file. Read with `weights_only=True`: nothing in it is run.
        output: The store's folder.
        names: Module name -> hook name, for modules other than blocks of the language model.
        made_by: What is known of its making and not in the file (model, revision, word, ...).

    Returns:
        The store; samples without the token of interest are in its table of skipped ones.

    Raises:
        StoreError: If the file is something else, or holds more than tensors, text and numbers; if modules or lists
            do not fit each other.
    """
    data = _read(Path(source))
    states = data["hidden_states"]
    modules = sorted(states[0])
    hooks = {module: (names or {}).get(module) or hook_name(module) for module in modules}
    parts: list[tuple[dict[str, torch.Tensor], list[Any], list[Any], list[Any]]] = []
    for number, state in enumerate(states):
        name = str(number)
        mask = data.get("token_of_interest_mask")
        if mask is not None and not bool(torch.as_tensor(mask[number]).all()):
            parts.append(({}, [], [], [{"sample": name, "reason": "the token of interest was not found in it"}]))
            continue
        values = {hooks[module]: _positions(state, module, number, str(source)) for module in modules}
        counts = {hook: len(value) for hook, value in values.items()}
        if len(set(counts.values())) > 1:
            raise StoreError(f"sample {number} of {str(source)!r} has {counts} positions; import the modules apart")
        sample = {
            "sample": name,
            "sample_number": number,
            "image": _only(data.get("image"), number),
            "text": _only(data.get("model_predictions"), number),
        }
        rows = [{"sample": name, "selector": "XL-VLMs"}] * next(iter(counts.values()))
        parts.append((values, rows, [sample], []))
    # Only now, so that a file that is refused leaves nothing behind.
    writer = StoreWriter(
        output,
        {
            "model": None,
            "imported": {"format": "XL-VLMs", "file": str(source)},
            "hooks": [hooks[module] for module in modules],
            **(made_by or {}),
        },
    )
    for part in parts:
        writer.add(*part)
    writer.close()
    return ActivationStore.open(output)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise StoreError(f"there is no file {str(file)!r}; check the path")
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader of pickles makes of bytes that are none
        raise StoreError(
            f"{str(file)!r} is no file of plain tensors, or holds objects that would have to be run to be read; where "
            "it was made, keep tensors, text and numbers only and save it again"
        ) from error
    states = data.get("hidden_states") if isinstance(data, dict) else None
    if not isinstance(states, list) or not states or not all(isinstance(state, dict) for state in states):
        raise StoreError(
            f"{str(file)!r} has no list 'hidden_states' with a dictionary per sample; XL-VLMs's src/save_features.py "
            "writes such files"
        )
    for what, values in data.items():
        if isinstance(values, list) and len(values) != len(states):
            raise StoreError(f"{str(file)!r} has {len(states)} samples, but {len(values)} of {what!r}")
    return data


def _positions(state: Mapping[str, torch.Tensor], module: str, number: int, source: str) -> torch.Tensor:
    if module not in state:
        raise StoreError(f"sample {number} of {source!r} has no {module!r}, which sample 0 has")
    value = state[module]
    if value.ndim == 3 and len(value) == 1:
        return value[0]
    if value.ndim == 2:
        return value
    raise StoreError(f"sample {number} of {source!r} has {module!r} of shape {tuple(value.shape)}, not (1, pos, d)")


def _only(values: list[Any] | None, number: int) -> Any:
    """An entry, out of the list of one that a batch of one makes."""
    if values is None:
        return None
    entry = values[number]
    return entry[0] if isinstance(entry, list | tuple) and len(entry) == 1 else entry
