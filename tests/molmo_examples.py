"""Prompts with no, one and two pictures, alone and in padded batches, for comparisons with the reference."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence

from tests.molmo_published import END_ID, image_ids
from tests.molmo_reference import Example, Sizes, example

SIZES = Sizes()
PICTURES: dict[str, list[tuple[int, int]]] = {
    "text": [],
    "one": [(53, 131)],
    "small": [(20, 33)],
    "two": [(70, 40), (31, 96)],
}
"""Height and width of the pictures of each example."""
_PROMPTS = {"text": [5, 80, 290, 7], "one": [9, 10, 11], "small": [250], "two": [1, 2, 3, 4, 5]}


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 with smooth and with sharp places."""
    rng = np.random.default_rng(seed)
    coarse = torch.tensor(rng.integers(0, 256, (1, 3, 5, 7)), dtype=torch.float32)
    smooth = interpolate(coarse, (height, width), mode="bilinear")[0].permute(1, 2, 0).numpy()
    return np.clip(smooth + rng.integers(-30, 30, (height, width, 3)), 0, 255).astype(np.uint8)


@functools.cache
def examples() -> dict[str, Example]:
    """All of them by name."""
    return {
        name: example([photograph(*size) for size in sizes], _PROMPTS[name], END_ID, SIZES, image_ids(SIZES))
        for name, sizes in PICTURES.items()
    }


def batch_of(rows: Sequence[Example], side: str = "right", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What the model is given: tokens padded on that side, crops behind with -1."""

    def crops(values: list[Any], kind: torch.dtype) -> Tensor:
        return pad_sequence([torch.tensor(value, dtype=kind) for value in values], True, -1)

    def tokens(values: list[Tensor], fill: int) -> Tensor:
        return pad_sequence(values, True, fill, padding_side=side)

    ids = [torch.tensor(row.tokens) for row in rows]
    batch = {"input_ids": tokens(ids, END_ID), "attention_mask": tokens([torch.ones_like(row) for row in ids], 0)}
    if any(len(row.crops) for row in rows):
        length = batch["input_ids"].shape[1]
        before = [length - len(row.tokens) if side == "left" else 0 for row in rows]
        moved = [np.where(row.places < 0, -100, row.places + more) for row, more in zip(rows, before, strict=True)]
        batch["images"] = crops([row.crops for row in rows], dtype)
        batch["image_masks"] = crops([row.masks for row in rows], dtype)
        batch["image_input_idx"] = crops(moved, torch.long)
    return batch


def own_part(values: Tensor, row: Example, side: str) -> Tensor:
    """Of a row of a padded batch, what belongs to the example."""
    return values[: len(row.tokens)] if side == "right" else values[len(values) - len(row.tokens) :]
