"""Models that lie: one hook point of a miniature does not mean what its name says. For the tests of `conformance`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hooked_mm.access import Access
from hooked_mm.batch import Batch, batch_from_inputs
from hooked_mm.conformance import ConformanceReport, check_conformance
from hooked_mm.hooked import HookedMM
from hooked_mm.resolve import resolve
from hooked_mm.structure import Block, Structure
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from hooked_mm.views import Pass

COPIES = 8
Change = Callable[[Structure], Structure]


@cache
def built(family: str) -> Any:
    """A family's miniature, built once; nothing here changes its modules."""
    return miniature(family)


@cache
def honest(family: str) -> Structure:
    """What is really where."""
    return resolve(built(family))


def equal_samples(family: str, count: int = COPIES) -> dict[str, Tensor]:
    """One sample several times: every pass of writes then tests as many points."""
    one = miniature_inputs(built(family), 1)
    return {name: torch.cat([value] * count) for name, value in one.items()}


def change_block(stream: str, layer: int, change: Callable[[Block], Block]) -> Change:
    """Another description of one block."""

    def changed(structure: Structure) -> Structure:
        stack = structure.stacks[stream]
        blocks = (*stack.blocks[:layer], change(stack.blocks[layer]), *stack.blocks[layer + 1 :])
        return replace(structure, **{stream: replace(stack, blocks=blocks)})

    return changed


def change_parts(stream: str, layer: int, **parts: str | None) -> Change:
    """Roles of one block are played by other modules; None: by no module."""

    def changed(block: Block) -> Block:
        made = {**block.parts, **parts}
        return replace(block, parts=MappingProxyType({role: path for role, path in made.items() if path is not None}))

    return change_block(stream, layer, changed)


def swap_parts(stream: str, layer: int, one: str, two: str) -> Change:
    """Two roles of one block are exchanged."""

    def changed(block: Block) -> Block:
        made = {**block.parts, one: block.parts[two], two: block.parts[one]}
        return replace(block, parts=MappingProxyType(made))

    return change_block(stream, layer, changed)


def swap_blocks(stream: str, one: int, two: int) -> Change:
    """Two blocks of a stack in the wrong order."""

    def changed(structure: Structure) -> Structure:
        stack = structure.stacks[stream]
        blocks = list(stack.blocks)
        blocks[one], blocks[two] = blocks[two], blocks[one]
        return replace(structure, **{stream: replace(stack, blocks=tuple(blocks))})

    return changed


@dataclass(frozen=True)
class Distorted:
    """An access that lies about another: what it reads, or what it writes.

    `seen` makes of a value what is shown; `before` distorts the model's value at every read; `put` replaces the write.
    """

    access: Any
    seen: Callable[[Tensor], Tensor] = lambda value: value
    before: Callable[[Tensor], Tensor] | None = None
    put: Callable[[Any, Pass, Tensor], None] = lambda access, run, new: access.write(run, new)

    @property
    def module(self) -> str:
        """Where the honest access lies."""
        return self.access.module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.access, name)

    def read(self, run: Pass) -> Tensor:
        """The honest value, or what is made of it."""
        value = self.access.read(run)
        if self.before is not None:
            value = self.before(value)
            self.access.write(run, value)
        return self.seen(value)

    def write(self, run: Pass, new: Tensor) -> None:
        """The honest write, or what takes its place."""
        self.put(self.access, run, new)


def lying(family: str, change: Change | None = None, distorted: dict[str, Any] | None = None) -> HookedMM:
    """A miniature with a changed structure, or with other accesses for some points; not checked yet."""
    structure = honest(family)
    model = HookedMM(built(family), check=False, structure=change(structure) if change else structure)
    for name, make in (distorted or {}).items():
        point = model._points[name]
        access: Access = make(point.access)
        model._points[name] = replace(point, access=access)  # type: ignore[index]
    return model


def report_of(model: HookedMM, alter: Callable[[Batch], Batch] | None = None) -> ConformanceReport:
    """What conformance says of a model on equal samples, or on what `alter` makes of their batch."""
    batch = batch_from_inputs(equal_samples(model.structure.family), model.structure, model._config)
    return check_conformance(model, alter(batch) if alter else batch, copies=COPIES)
