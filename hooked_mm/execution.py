"""When a model's values pass: a list of hook points in execution order must be just that.

A point that lies at another module is most often met at the wrong time. Raw PyTorch hooks tell when each module runs;
the points that do not fit between the others are the ones that lie elsewhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hooked_mm.access import Side
from hooked_mm.batch import Batch
from hooked_mm.hook_points import HookPoint

if TYPE_CHECKING:
    from hooked_mm.runner import Runner

Event = tuple[str, Side]


def passing_times(runner: Runner, points: Mapping[str, HookPoint], batch: Batch) -> dict[str, int]:
    """Hook point -> when its value passes for the first time in a forward pass; missing where it never does."""
    events: dict[Event, int] = {}

    def note(event: Event, *_: Any) -> None:
        events.setdefault(event, len(events))

    handles = []
    try:
        for path, side in {(point.module, point.access.side) for point in points.values()}:
            module = runner.module(path)
            register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            handles.append(register(partial(note, (path, side))))
        runner.run_tapped(points.values(), batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: events.get((point.module, point.access.side)) for name, point in points.items()}
    return {name: time for name, time in found.items() if time is not None}


def out_of_order(times: Sequence[int]) -> set[int]:
    """Indices that are not in every longest part of a sequence that never falls: of two exchanged ones, both."""
    before = _lengths(times)
    behind = _lengths([-time for time in reversed(times)])[::-1]
    longest = max(before, default=0)
    rank = {i: n for i, (n, m) in enumerate(zip(before, behind, strict=True)) if n + m - 1 == longest}
    alone = Counter(rank.values())
    return {index for index in range(len(times)) if index not in rank or alone[rank[index]] > 1}


def _lengths(times: Sequence[int]) -> list[int]:
    """For each element, the length of the longest part that never falls and ends with it."""
    # ends[n]: the smallest last element of any such part of n + 1 elements.
    ends: list[int] = []
    found = []
    for time in times:
        place = bisect_right(ends, time)
        ends[place : place + 1] = [time]
        found.append(place + 1)
    return found
