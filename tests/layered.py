"""Stores of rows at several layers, whose content is planted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_mm.store import ActivationStore


def layered_store(
    path: Path,
    values: Mapping[int, Tensor | np.ndarray],
    samples: Sequence[int],
    modality: Sequence[str] | None = None,
    words: Sequence[str | None] | None = None,
    columns: Sequence[Mapping[str, Any]] | None = None,
) -> ActivationStore:
    """A store as an extraction leaves one.

    Args:
        path: Its folder.
        values: Layer -> rows (n, d); 0 is what enters the first block.
        samples: Per row the number of its sample, in ascending order.
        modality: Per row; text unless given.
        words: Per row its token.
        columns: Per sample further columns.
    """
    names = {0: "blocks.0.hook_resid_pre", **{n: f"blocks.{n - 1}.hook_resid_post" for n in values if n}}
    rows, seen = [], {}
    for place, number in enumerate(samples):
        seen[number] = seen.get(number, -1) + 1
        rows.append(
            {
                "sample": f"s{number}",
                "position": seen[number],
                "modality": "text" if modality is None else modality[place],
                "role": None,
                "word": None if words is None else words[place],
                "selector": "EachOf",
            }
        )
    table = [{"sample": f"s{n}", "sample_number": n, **(columns[n] if columns else {})} for n in sorted(seen)]
    held = {names[layer]: torch.as_tensor(value) for layer, value in values.items()}
    return ActivationStore.from_arrays(path, held, rows, table, {"model": "planted"})
