"""What the processes of a run exchange once each holds a share of the rows: sums, and small values."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


class Processes:
    """The processes of a run; alone, every method gives back what it was given."""

    def __init__(self) -> None:
        self.many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.many else 0
        self.size = dist.get_world_size() if self.many else 1

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, bit for bit the same in all of them."""
        if self.many:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """A small value of every process."""
        if not self.many:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def goes_on_alone() -> bool:
    """Whether this process is the one that goes on, now that all have extracted: fits would wait for the others."""
    first = not Processes().rank
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return first
