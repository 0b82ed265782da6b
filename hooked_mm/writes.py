"""Proof that a write at a hook point acts, acts at that place, and changes nothing else.

Three properties per point. Zeroing it changes what follows, bit for bit. The stream is still the sum of what is added
to it, with the new value in it. Writing back what was read changes nothing but by rounding. When the batch is one
sample several times, every row tests another point in the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.checks import Check, Verdict, compare
from hooked_mm.equations import BlockEquations
from hooked_mm.hook_points import HookPoint
from hooked_mm.runner import Hook, Runner
from hooked_mm.structure import PREFIXES, Structure

_STREAM = (
    *("resid_pre", "conv1_out", "attn_out", "mixer_out", "xattn_out"),
    *("resid_mid", "conv2_out", "mlp_out", "extra_out", "rescale_out", "resid_post"),
)
GROUP = 8
"""So many times as many points as there are rows are written back at once."""
CHANGES, SUM, BACK = (
    "a write changes what follows",
    "after a write the stream is still the sum",
    "writing back what was read changes nothing",
)


class Probe(Protocol):
    """What these checks need to know of a conformance check."""

    model: Any
    batch: Batch
    runner: Runner
    structure: Structure
    points: dict[str, HookPoint]
    copies: int

    @property
    def embedded(self) -> str:
        """The point that holds image features."""

    def names(self) -> list[str]:
        """The points that are tested."""

    def follower(self, name: str) -> str | None:
        """Where a write must be seen."""

    def keep(self, stream: str) -> Tensor | None:
        """Positions of a stream that are not padding."""


class WriteChecks:
    """The checks that write.

    Args:
        probe: Model, batch and points.
        values: What was read, patterns included.
    """

    def __init__(self, probe: Probe, values: Mapping[str, Tensor]) -> None:
        self.probe, self.values = probe, values
        self.names = probe.names()
        self.follows = {name: self._follower(name) for name in self.names}
        self._broken: dict[str, set[str]] = {}

    def _follower(self, name: str) -> str | None:
        """Where the write must be seen; in the logits, where that point is itself not reached."""
        point = self.probe.follower(name)
        return point if point is None or point in self.values else "hook_logits"

    def _forward(self, watched: set[str], hooks: list[Any]) -> dict[str, Tensor]:
        logits, found = self.probe.runner.forward(self.probe.batch, sorted(watched), hooks, save=True)
        assert logits is not None
        # What the model returns, not what was written there.
        place = self.probe.batch.input_ids.device
        return {name: value.to(place) for name, value in {**found, "hook_logits": logits}.items()}

    def all(self) -> Iterator[Check]:
        """Every check of every point."""
        # Those that switch another attention on are tested together, the others without it.
        for tapped in (False, True):
            names = [name for name in self.names if (self.probe.points[name].tap is not None) == tapped]
            for start in range(0, len(names), GROUP * self.probe.copies):
                yield from self._group(names[start : start + GROUP * self.probe.copies])

    def _group(self, names: list[str]) -> Iterator[Check]:
        """Write back what was read at all points; then zero one of them per row, and compare with that, bit for bit."""
        watched = {point for name in names if (point := self.follows[name]) is not None}
        # Writing back rounds, and a write must be told from that.
        before = self._forward(watched, [(name, _same) for name in names])
        good = list(names)
        for check in self._back(names, before):
            yield check
            if check.verdict == "fails":
                good.remove(check.point)
        if len(good) < len(names):
            before = self._forward(watched, [(name, _same) for name in good])
        for start in range(0, len(names), self.probe.copies):
            yield from self._spoiled(names[start : start + self.probe.copies], good, before)

    def _spoiled(self, names: list[str], good: list[str], before: Mapping[str, Tensor]) -> Iterator[Check]:
        copies = self.probe.copies
        hooks: list[Any] = [(name, _same) for name in good if name not in names]
        hooks += [(name, partial(_spoil, row=row, rows=copies)) for row, name in enumerate(names)]
        watched = {point for name in names if (point := self.follows[name]) is not None}
        after = self._forward(watched | {other for name in names for other in self._stream(name)}, hooks)
        for row, name in enumerate(names):
            point = self.follows[name]
            if point is None:
                kind = "the projector reads an earlier block of the tower; nothing follows"
                yield Check(CHANGES, name, "not applicable", None, kind)
                continue
            old, new = (_part(found[point], row, copies) for found in (before, after))
            verdict: Verdict = "fails" if torch.equal(old, new) else "holds"
            yield Check(CHANGES, name, verdict, None, f"looked at {point}")
            yield from self._sum(name, row, after)

    def _back(self, names: list[str], after: Mapping[str, Tensor]) -> Iterator[Check]:
        """Where a group of points changes something by being written back: which of them does?"""
        found = {name: point for name in names if (point := self.follows[name]) is not None}
        checks = [self._compared(name, point, after) for name, point in found.items()]
        if any(check.verdict == "fails" for check in checks):
            checks = [
                self._compared(name, point, self._forward({point}, [(name, _same)])) for name, point in found.items()
            ]
        yield from checks

    def _stream(self, name: str) -> list[str]:
        """The points of this point's block that the stream is the sum of."""
        point = self.probe.points[name]
        if point.layer is None:
            return []
        prefix = f"{PREFIXES[point.stream]}blocks.{point.layer}.hook_"
        return [prefix + part for part in _STREAM if prefix + part in self.names]

    def _sum(self, name: str, row: int, after: Mapping[str, Tensor]) -> Iterator[Check]:
        """What was written is in the stream: a value that only the next module saw leaves the sum wrong."""
        point = self.probe.points[name]
        names = self._stream(name)
        if not names or point.layer is None:
            return
        block = self.probe.structure.stacks[point.stream].blocks[point.layer]
        prefix = f"{PREFIXES[point.stream]}blocks.{point.layer}."
        copies, keep = self.probe.copies, self.probe.keep(point.stream)
        values = {other: _part(after[other], row, copies) for other in names}
        keep = None if keep is None else _part(keep, row, copies)
        if prefix not in self._broken:
            unwritten = BlockEquations(
                self.values, self.probe.model.hf_model, block, prefix, self.probe.keep(point.stream)
            )
            self._broken[prefix] = {check.point for check in unwritten.sums() if check.verdict != "holds"}
        checks = list(BlockEquations(values, self.probe.model.hf_model, block, prefix, keep).sums())
        # What was written is not what the equation gives; a sum that never held says nothing of writes.
        totals = (f"{prefix}hook_resid_mid", f"{prefix}hook_resid_post")
        checks = [
            check for check in checks if check.point in totals and check.point not in {name, *self._broken[prefix]}
        ]
        if checks:
            worst = max(checks, key=lambda check: (check.verdict == "fails", check.error or 0.0))
            yield Check(SUM, name, worst.verdict, worst.error, worst.what if worst.verdict == "fails" else "")

    def _compared(self, name: str, point: str, after: Mapping[str, Tensor]) -> Check:
        keep = self.probe.keep(self.probe.points[point].stream)
        return compare(BACK, name, after[point], self.values[point], keep)


def _slices(value: Tensor, row: int, rows: int) -> tuple[Any, ...]:
    """Where one of `rows` equal samples lies in a value."""
    if rows == 1:
        return (slice(None),)
    if value.shape[0] % rows == 0:
        size = value.shape[0] // rows
        return (slice(row * size, (row + 1) * size),)
    # A packed tower's queries and patterns, and Pixtral's stream, have a batch of one, with all patches behind it.
    square = value.ndim == 4 and value.shape[2] == value.shape[3]
    axis = 1 if value.ndim == 3 or (value.ndim == 4 and value.shape[1] % rows == 0 and not square) else 2
    size = value.shape[axis] // rows
    part = slice(row * size, (row + 1) * size)
    return (slice(None), part) if axis == 1 else (slice(None), slice(None), part, part)


def _part(value: Tensor, row: int, rows: int) -> Tensor:
    return value[_slices(value, row, rows)]


def _spoil(value: Tensor, hook: Hook, *, row: int, rows: int) -> Tensor:
    """Zero one sample's part; a norm's divisor is tripled at every other position instead.

    One factor for all positions would be lost behind a second norm.
    """
    new = value.clone()
    where = _slices(value, row, rows)
    if hook.name.endswith("hook_scale"):
        new[where][..., ::2, :] *= 3
    else:
        new[where] = 0
    return new


def _same(value: Tensor, hook: Hook) -> Tensor:
    return value.clone()
