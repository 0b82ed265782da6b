"""Metrics whose state is records: texts and numbers per sample, gathered from all processes.

torchmetrics synchronises tensors only, and what is counted here has names that nobody knows beforehand (answers, their
types, captions). So every record is a line of JSON, and the state is the bytes of these lines: JSON writes no newline
within a record, floats come back exactly, and bytes of several processes are joined by writing them one after another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from hooked_mm.errors import BadInputError


def encode(records: Iterable[Any]) -> UInt8[Tensor, " bytes"]:
    """Records as bytes: a line of JSON for each."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    return torch.frombuffer(bytearray(lines.encode()), dtype=torch.uint8) if lines else torch.empty(0).byte()


def decode(parts: Iterable[UInt8[Tensor, " bytes"]]) -> list[Any]:
    """The records of which `encode` made these bytes."""
    return [json.loads(line) for part in parts for line in part.cpu().numpy().tobytes().splitlines()]


def gather(values: Tensor, group: Any = None) -> list[Tensor]:
    """The bytes of all processes; torchmetrics makes the nothing of a process that has seen no sample floats."""
    return gather_all_tensors(values.to(torch.uint8), group)


def check_lengths(**lists: Sequence[Any] | None) -> None:
    """Refuses lists of different lengths, and a text where a list is wanted; None stands for no list.

    Raises:
        BadInputError: If they are not lists of the same samples.
    """
    given = {name: values for name, values in lists.items() if values is not None}
    for name, values in given.items():
        if isinstance(values, str):
            raise BadInputError(f"{name}={values!r} is one text; write [{values!r}]")
    if len({len(values) for values in given.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in given.items())
        raise BadInputError(f"{counts}; there must be one of each for every sample")


class RecordMetric(Metric):
    """A metric that keeps a record per sample; `compute` of a subclass sees the records of all processes."""

    full_state_update = False
    lines: list[Tensor] | Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"dist_sync_fn": gather, **options})
        self.add_state("lines", [], dist_reduce_fx="cat")

    def keep(self, records: Iterable[Any]) -> None:
        """Add records: anything that JSON can hold."""
        assert isinstance(self.lines, list)  # one tensor only between a synchronisation and its end
        self.lines.append(encode(records).to(self.device))

    def records(self) -> list[Any]:
        """What was kept, in order; within `compute` that of all processes, the first process first."""
        return decode([self.lines] if isinstance(self.lines, Tensor) else self.lines)
