"""The one place that opens nnsight traces: reads, writes, stops, in a forward pass and in generation.

Everything the interface offers becomes a list of `(HookPoint, functions, save?)` in execution order, and `_visit` is
the only code that touches a module's values. nnsight requires accesses in execution order and refuses modules that do
not run; both are settled here, by sorting once and by leaving out the tower when there is no image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import nnsight
import torch
from torch import Tensor, nn

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, UnknownHookError, nearest
from hooked_mm.hook_points import HookPoint

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class Hook:
    """What a hook function is told: where it is. `step` counts forward passes of a generation, 0 is the prefill."""

    name: str
    layer: int | None
    step: int
    batch: Batch


HookFunction = Callable[[Tensor, Hook], Tensor | None]
HookSpec = tuple[NamesFilter, HookFunction]


@dataclass
class _Visit:
    """What shall happen at one point."""

    point: HookPoint
    functions: list[HookFunction] = field(default_factory=list)
    save: bool = False


def match_names(names_filter: NamesFilter, names: Iterable[str]) -> list[str]:
    """The hook names a filter chooses: None all, a name or glob, a list of those, or a callable on names.

    Raises:
        UnknownHookError: If a name or glob matches nothing; the nearest names are offered.
    """
    known = list(names)
    if names_filter is None:
        return known
    if callable(names_filter):
        return [name for name in known if names_filter(name)]
    chosen: set[str] = set()
    for pattern in [names_filter] if isinstance(names_filter, str) else names_filter:
        matched = [name for name in known if name == pattern or fnmatchcase(name, pattern)]
        if not matched:
            raise UnknownHookError(
                f"no hook point is called or matches {pattern!r}{nearest(pattern, known)}. See model.hook_names"
            )
        chosen.update(matched)
    return [name for name in known if name in chosen]


class Runner:
    """Runs a wrapped model with reads and writes at hook points.

    Invariants: accesses happen in execution order; reading changes no value; a value that was saved can't be changed
    by a later write in place; whatever happens inside, the model itself stays as it was.
    """

    def __init__(self, model: nn.Module, points: Mapping[str, HookPoint], aliases: dict[str, str]) -> None:
        self.nnsight = nnsight.NNsight(model, rename=aliases)
        self.points = points
        self._order = {name: index for index, name in enumerate(points)}
        self._stops = {p.layer: p for p in points.values() if p.stream == "text" and p.name.endswith("hook_resid_pre")}

    def _available(self, batch: Batch) -> set[str]:
        return {n for n, p in self.points.items() if batch.has_images or p.stream == "text"}

    def _plan(self, batch: Batch, names_filter: NamesFilter, hooks: Sequence[HookSpec], *, save: bool) -> list[_Visit]:
        available = self._available(batch)
        visits: dict[str, _Visit] = {}

        def chosen(wanted: NamesFilter) -> list[str]:
            names = match_names(wanted, self.points)
            present = [name for name in names if name in available]
            if names and not present:
                raise BadInputError(f"{names[0]!r} lies in the vision tower or projector, but this batch has no images")
            return present

        for wanted, function in hooks:
            for name in chosen(wanted):
                visits.setdefault(name, _Visit(self.points[name])).functions.append(function)
        if save:
            for name in chosen(names_filter):
                visits.setdefault(name, _Visit(self.points[name])).save = True
        return [visits[name] for name in sorted(visits, key=self._order.__getitem__)]

    def _visit(self, visit: _Visit, batch: Batch, step: int, *, copy: bool) -> Tensor:
        """Read a point's value, run its functions, write what they return; the value that goes on."""
        point = visit.point
        envoy = self.nnsight.get(point.module)
        raw = envoy.output if point.side == "output" else envoy.input
        whole = raw[0] if isinstance(raw, tuple) else raw
        value = whole if point.heads is None else whole.unflatten(-1, (point.heads, -1))
        for function in visit.functions:
            new = function(value, Hook(point.name, point.layer, step, batch))
            if new is None:
                continue
            if not isinstance(new, Tensor) or new.shape != value.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise BadInputError(
                    f"the hook at {point.name!r} returned {got}; it must return None or a tensor of shape "
                    f"{tuple(value.shape)}"
                )
            flat = new if point.heads is None else new.flatten(-2)
            if point.in_place:
                whole.copy_(flat)
            elif point.side == "input":
                envoy.input = flat
            else:
                envoy.output = (flat, *raw[1:]) if isinstance(raw, tuple) else flat
            value = value if point.in_place else new
        # A saved tensor may be the very one that a later write in place changes.
        return value.clone() if copy else value

    def forward(
        self,
        batch: Batch,
        names_filter: NamesFilter = None,
        hooks: Sequence[HookSpec] = (),
        *,
        save: bool = False,
        stop_at_layer: int | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """One forward pass: logits (None if stopped before them) and the saved activations."""
        visits = self._plan(batch, names_filter, hooks, save=save)
        stop = None
        if stop_at_layer is not None:
            stop = self._stop_point(stop_at_layer)
            visits = self._before(visits, stop, named=names_filter is not None)
        copy = any(visit.functions for visit in visits)
        saved: dict[str, Tensor] = {}
        logits = None
        inputs = batch.inputs
        with self.nnsight.trace(**inputs) as tracer:
            for visit in visits:
                value = self._visit(visit, batch, 0, copy=copy)
                if visit.save:
                    saved[visit.point.name] = value
            if stop is not None:
                # Waiting for the point is what lets the model run up to it.
                _ = self.nnsight.get(stop.module).input
                tracer.stop()
            logits = nnsight.save(self.nnsight.output.logits)
        return logits, saved

    def _stop_point(self, stop_at_layer: int) -> HookPoint:
        n_layers = len(self._stops)
        layer = stop_at_layer + n_layers if stop_at_layer < 0 else stop_at_layer
        if not 0 <= layer <= n_layers:
            raise BadInputError(f"stop_at_layer={stop_at_layer} is outside this model's {n_layers} layers")
        if layer == n_layers:
            norm = self.points["ln_final.hook_out"]
            return HookPoint("(before the final norm)", norm.module, "input", "text", None, "")
        return self._stops[layer]

    def _before(self, visits: list[_Visit], stop: HookPoint, *, named: bool) -> list[_Visit]:
        """Visits that happen before the stop; names asked for explicitly that do not are refused."""
        limit = self._order.get(stop.name, self._order["ln_final.hook_out"])
        # The stop is where block `l` begins; `hook_embed` names the same place as the input of block 0.
        kept = [v for v in visits if self._order[v.point.name] < limit and v.point.module != stop.module]
        late = [v.point.name for v in visits if v not in kept]
        if late and (named or not kept):
            raise BadInputError(
                f"{late[0]!r} is not reached when stopping at {stop.name!r}; stop later or leave it out"
            )
        return kept

    def generate(self, batch: Batch, hooks: Sequence[HookSpec], options: dict[str, Any]) -> Any:
        """`generate` of the wrapped model with functions at hook points in every step; its own result."""
        visits = self._plan(batch, (), hooks, save=False)
        # The tower and projector run in the prefill alone. A worker that waited for them in a later step would end
        # there, and with it every later intervention: so they have a worker of their own.
        prefill = [visit for visit in visits if visit.point.stream != "text"]
        each_step = [visit for visit in visits if visit.point.stream == "text"]
        # Position ids grow with every step: transformers counts them from the attention mask, as we do.
        inputs = {**{name: value for name, value in batch.inputs.items() if name != "position_ids"}, **options}
        result = None
        with warnings.catch_warnings(), torch.no_grad():
            # The loop over steps has an open end, since nobody knows when the model will stop.
            warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")
            with self.nnsight.trace(fn="generate") as tracer:
                with tracer.invoke(**inputs):
                    for visit in prefill:
                        self._visit(visit, batch, 0, copy=False)
                if each_step:
                    with tracer.invoke():
                        for step in tracer.iter[:]:
                            for visit in each_step:
                                self._visit(visit, batch, step, copy=False)
                with tracer.invoke():
                    result = nnsight.save(tracer.result)
        return result
