"""Rows that golden values of geometry are of, layers with planted steps, and processes played by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from analyses import result
from analyses.layers import Layers
from tests.layered import layered_store


class Golden(NamedTuple):
    """Rows X (1000, 10), Y (1000, 10) = X W + .5 tanh(3 X), Z (1000, 50) of rank 3."""

    x: Tensor
    y: Tensor
    z: Tensor


def golden() -> Golden:
    """Drawn in this order."""
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((1000, 10)), random.standard_normal((10, 10))
    z = random.standard_normal((1000, 3)) @ random.standard_normal((3, 50))
    return Golden(*(torch.as_tensor(rows) for rows in (x, x @ weight + 0.5 * np.tanh(3 * x), z)))


class Process:
    """One of several processes (`hooked_mm.processes.Processes`), played by threads.

    Attributes:
        rank: Its number.
        size: How many there are.
    """

    def __init__(self, rank: int, barrier: threading.Barrier, given: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._given = rank, len(given), barrier, given

    def gather(self, value: Any) -> list[Any]:
        """Waits for the others."""
        self._given[self.rank] = value
        self._barrier.wait(60)
        found = list(self._given)
        self._barrier.wait(60)
        return found

    def sum(self, value: Tensor) -> Tensor:
        """Of all."""
        return torch.stack(self.gather(value)).sum(0)


def in_processes(work: Callable[[Process], Any], count: int = 2) -> list[Any]:
    """What the work gives in each."""
    barrier, given = threading.Barrier(count), [None] * count
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, [Process(rank, barrier, given) for rank in range(count)]))


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are written without their pictures, which take seconds."""
    monkeypatch.setattr(result, "score_figure", lambda *_: None)


SAMPLES = [sample for sample in range(24) for _ in range(6 + sample % 5)]
"""Of each row of `stream`."""


def stream(path: Path) -> Layers:
    """Three layers of 24 samples: a linear step, then one that is not; a third of the rows image rows.

    The first row of every sample is the same at layer 0, as a first token is.
    """
    random = torch.Generator().manual_seed(0)
    n, d = len(SAMPLES), 6
    own = torch.randn(24, d, generator=random)[SAMPLES]
    first = own + torch.randn(n, d, generator=random) * torch.tensor([3.0, 2, 1, 1, 1, 1]) + 1
    first[[SAMPLES.index(sample) for sample in range(24)]] = 1.5
    second = first @ torch.randn(d, d, generator=random) + 2
    third = second + 2 * torch.tanh(3 * second) + own + torch.randn(n, d, generator=random)
    kinds = ["image" if place % 3 == 1 else "text" for place in range(n)]
    words = [None if kind == "image" else f"w{place}" for place, kind in enumerate(kinds)]
    return Layers.of_store(layered_store(path, {0: first, 1: second, 2: third}, SAMPLES, kinds, words))
