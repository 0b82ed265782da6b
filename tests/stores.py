"""Stores whose content is told by their samples' numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from hooked_mm.store import ActivationStore
from hooked_mm.store_format import ROW_COLUMNS
from hooked_mm.store_writer import StoreWriter

MADE_BY = {"model": "small", "hooks": ["a", "b"], "seed": 3, "words": ("red", "blue")}


def sample(number: int) -> dict[str, Any]:
    """One call of `StoreWriter.add`: sample `number` with `number % 3` rows, all numbers told by it."""
    rows = number % 3
    base = torch.arange(rows * 4, dtype=torch.float32).reshape(rows, 4) + 100 * number
    name = f"s{number}"
    return {
        "values": {"a": base, "b": (-base[:, :2]).bfloat16()},
        "rows": [
            {
                "sample": name,
                "position": row,
                "modality": "text",
                "role": "answer",
                "word": f"w{row}",
                "selector": "all",
            }
            for row in range(rows)
        ],
        "samples": [{"sample": name, "text": f"text {number}", "colours": ["red"] * rows}],
    }


def contents(store: ActivationStore) -> Counter[tuple]:
    """The multiset of rows with their values."""
    a, b = store.activations("a").tolist(), store.activations("b").float().tolist()
    rows = store.rows.select(ROW_COLUMNS).to_pylist()
    assert len(rows) == len(a) == len(b)
    return Counter((*row.values(), *x, *y) for row, x, y in zip(rows, a, b, strict=True))


def write(path: Path, numbers: range, **options: Any) -> ActivationStore:
    """A store of these samples."""
    writer = StoreWriter(path, MADE_BY, **options)
    for number in numbers:
        if f"s{number}" not in writer.done():
            writer.add(**sample(number))
    writer.close()
    return ActivationStore.open(path)


def unfinished(path: Path, made_by: dict[str, Any] = MADE_BY) -> None:
    """A store with one part that nobody closed."""
    writer = StoreWriter(path, made_by)
    writer.add(**sample(2))
    writer.flush()
