"""The rows that golden values of geometry are of, and how the tools they come from compute."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


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
    """One of several processes that only add up, played by threads.

    Attributes:
        rank: Its number.
    """

    def __init__(self, rank: int, barrier: threading.Barrier, given: list[Tensor]) -> None:
        self.rank, self._barrier, self._given = rank, barrier, given

    def sum(self, value: Tensor) -> Tensor:
        """Waits for the others."""
        self._given[self.rank] = value
        self._barrier.wait(30)
        total = torch.stack(self._given).sum(0)
        self._barrier.wait(30)
        return total


def in_processes(work: Callable[[Process], Any], count: int = 2) -> list[Any]:
    """What the work gives in each."""
    barrier, given = threading.Barrier(count), [torch.zeros(())] * count
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, [Process(rank, barrier, given) for rank in range(count)]))
