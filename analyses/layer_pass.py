"""Passes over the rows of a few layers, in chunks and in a share per process, and the scores that come of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.layers import Layers
from analyses.neighbours import row_hashes
from analyses.result import Score
from hooked_mm.processes import Processes


class LayerPass:
    """The rows of a modality at some layers.

    Args:
        layers: The rows.
        numbers: At which layers; scores are named by the first.
        modality: What the rows are.
        device: Where sums are computed.
        processes: Each goes through its share of the rows.

    Attributes:
        sample: (n,), per row its sample, 0, 1, ... of those that have rows.
        samples: How many these are.
        width: d.
        copies: Rows that are there before at the first layer; known after `chunks` went through with `count`.
    """

    def __init__(
        self,
        layers: Layers,
        numbers: Sequence[int],
        modality: str,
        device: torch.device | str,
        processes: Processes,
    ) -> None:
        self.layers, self.numbers, self.modality = layers, list(numbers), modality
        self.device, self.processes = torch.device(device), processes
        _, number = np.unique(layers.samples, return_inverse=True)
        self.sample: Int[Tensor, " n"] = torch.as_tensor(number)
        self.samples = int(number.max()) + 1
        self.width = layers.values(self.numbers[0], slice(0, 1)).shape[1]
        self.copies = 0

    def __len__(self) -> int:
        return len(self.layers)

    def chunks(self, *, count: bool = False) -> Iterator[tuple[Int[Tensor, " m"], list[Float[Tensor, "m d"]]]]:
        """Indices of rows, and their values at each of the layers.

        Args:
            count: Count `copies` on the way.
        """
        hashes = torch.zeros(len(self), dtype=torch.long)
        for rows, values in self.layers.batches(self.numbers, processes=self.processes):
            where, here = torch.as_tensor(rows), [values[layer].to(self.device) for layer in self.numbers]
            if count:
                hashes[where] = row_hashes(here[0]).cpu()
            yield where, here
        if count:
            self.copies = len(self) - len(self.total(hashes).unique())

    def total(self, value: Tensor) -> Tensor:
        """Over all processes, which exchange what is on their devices; on the CPU."""
        return self.processes.sum(value.to(self.device)).cpu()

    def score(
        self, name: str, value: float, ends: tuple[float, float] = (math.nan, math.nan), rows: int | None = None
    ) -> Score:
        """A score with what it was computed of."""
        rows = len(self) if rows is None else rows
        return Score(name, self.modality, self.numbers[0], value, ends[0], ends[1], rows, self.samples)


def told_copies(modality: str, copies: Mapping[int, int], what: str) -> str:
    """A note on how many rows are copies of others, layer by layer.

    Args:
        modality: Of the rows.
        copies: Layer -> how many.
        what: Became of them.
    """
    listed = ", ".join(f"{layer}: {count}" for layer, count in sorted(copies.items()) if count)
    return f"{modality}: rows that are copies of others ({what}), by layer: {listed or 'none'}"
