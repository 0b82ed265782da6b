"""The one place that opens nnsight traces: reads, writes, gradients, stops, in a forward pass and in generation.

Everything the interface offers becomes a list of `(HookPoint, functions, save?)` in execution order, and `_visit` is
the only code that touches a module's values. nnsight requires accesses in execution order and refuses modules that do
not run; both are settled here, by sorting once and by leaving out the tower when there is no image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import nnsight
import torch
from torch import Tensor, nn

from hooked_mm.attention import AttentionSite, AttentionTaps, configurations, tapped
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, UnknownHookError, nearest
from hooked_mm.hook_points import HookPoint
from hooked_mm.repeats import run_once
from hooked_mm.structure import NO_TOWER, Structure
from hooked_mm.views import Pass
from hooked_mm.weights import device_of

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
    """What shall happen at one point; `track`: its value becomes a node of the gradient's graph."""

    point: HookPoint
    functions: list[HookFunction] = field(default_factory=list)
    backward: list[HookFunction] = field(default_factory=list)
    save: bool = False
    track: bool = False
    needed: bool = False


def match_names(
    names_filter: NamesFilter,
    names: Iterable[str],
    costly: Iterable[str] = (),
    explain: Mapping[str, str] | None = None,
) -> list[str]:
    """The hook names a filter chooses: None all that cost nothing, a name or glob, a list of those, or a callable.

    Args:
        names_filter: The filter; None leaves out the `costly` names, everything else may choose them.
        names: All names, in execution order.
        costly: Names that are chosen only when asked for.
        explain: Names that this model lacks, with the reason, for the error's text.

    Raises:
        UnknownHookError: If a name or glob matches nothing; the nearest names are offered.
    """
    known = dict.fromkeys(names)
    if names_filter is None:
        left_out = set(costly)
        return [name for name in known if name not in left_out]
    if callable(names_filter):
        return [name for name in known if names_filter(name)]
    chosen: set[str] = set()
    for pattern in [names_filter] if isinstance(names_filter, str) else names_filter:
        matched = [pattern] if pattern in known else [name for name in known if fnmatchcase(name, pattern)]
        if not matched:
            # Either may be a glob.
            lacking = (explain or {}).items()
            reasons = [why for name, why in lacking if fnmatchcase(name, pattern) or fnmatchcase(pattern, name)]
            why = f": not available, because {reasons[0]}" if reasons else ""
            raise UnknownHookError(
                f"no hook point is called or matches {pattern!r}{why}{nearest(pattern, known)}. See model.hook_names"
            )
        chosen.update(matched)
    return [name for name in known if name in chosen]


class _Root(nn.Module):
    """The model with the taps beside it, so that nnsight sees both and the model stays as it is."""

    def __init__(self, model: nn.Module, taps: list[AttentionTaps]) -> None:
        super().__init__()
        self.model, self.taps = model, nn.ModuleList(taps)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def generate(self, **inputs: Any) -> Any:
        generate: Any = self.model.generate
        return generate(**inputs)


class _Traced(nnsight.NNsight):
    """nnsight moves a trace's inputs to where the first weights are: for offloaded ones, to where they will be."""

    @property
    def device(self) -> torch.device:
        return device_of(self._module)


class Runner:
    """Runs a wrapped model with reads and writes at hook points.

    Invariants: accesses happen in execution order; reading changes no value; a value that was saved can't be changed
    by a later write in place; whatever happens inside, the model itself stays as it was.
    """

    def __init__(self, model: nn.Module, structure: Structure, points: Mapping[str, HookPoint]) -> None:
        self.unavailable: dict[str, str] = dict(structure.absent)
        self.points: Mapping[str, HookPoint] = points
        if structure.left_out:
            self.withdraw({name: NO_TOWER for name, point in points.items() if point.needs_image})
        self.sites = dict(_sites(model, structure))
        self._tap_paths = {
            f"taps:{path}:{tap}": f"taps.{index}.{tap}"
            for index, path in enumerate(self.sites)
            for tap in ("q", "k", "pattern")
        }
        self._root = root = _Root(model, [site.taps for site in self.sites.values()])
        # Not `train()`, which would set every module of the model, also those that were set one by one.
        root.training = model.training
        self.nnsight = _Traced(root)
        self._order = {name: index for index, name in enumerate(points)}
        self._costly = [name for name, point in points.items() if point.costly]
        self._after = structure.final_norm or structure.unembed
        self._stops = {
            point.layer: point
            for point in points.values()
            if point.stream == "text" and point.name.endswith("hook_resid_pre")
        }

    def withdraw(self, reasons: Mapping[str, str]) -> None:
        """Take points out of the list, with the reason that an error shall give."""
        self.unavailable.update(reasons)
        self.points = {name: point for name, point in self.points.items() if name not in reasons}

    def get(self, path: str) -> Any:
        """The envoy of a module of the transformers model, or of a tap."""
        if path.startswith("taps:"):
            return self.nnsight.get(self._tap_paths[path])
        found = self.nnsight.model
        for name in path.split(".") if path else ():
            # A module that is called as nnsight calls its values (BERT's `output`) has another name there.
            found = getattr(found, f"E_{name}" if hasattr(type(found), name) else name)
        return found

    def module(self, path: str) -> nn.Module:
        """The module itself, of the transformers model or a tap."""
        if path.startswith("taps:"):
            return self._root.get_submodule(self._tap_paths[path])
        return self._root.model.get_submodule(path)

    def run_tapped(self, points: Iterable[HookPoint], batch: Batch) -> None:
        """A forward pass outside nnsight with the taps of these points switched on, for raw hooks to watch."""
        with self._taps([_Visit(point) for point in points]):
            self._root.model(**batch.inputs)

    def _reached(self, point: HookPoint, batch: Batch) -> bool:
        return batch.has_images or not (point.needs_image or point.stream == "projector")

    def _plan(
        self,
        batch: Batch,
        names_filter: NamesFilter,
        hooks: Sequence[HookSpec],
        *,
        save: bool,
        backward: Sequence[HookSpec] = (),
        track: bool = False,
    ) -> list[_Visit]:
        visits: dict[str, _Visit] = {}

        def chosen(wanted: NamesFilter) -> list[_Visit]:
            names = match_names(wanted, self.points, self._costly, self.unavailable)
            present = [name for name in names if self._reached(self.points[name], batch)]
            if names and not present:
                raise BadInputError(
                    f"{names[0]!r} is reached only by images (it lies in the vision tower, the projector or a layer of "
                    "cross-attention), but this batch has no images"
                )
            return [visits.setdefault(name, _Visit(self.points[name])) for name in present]

        for wanted, function in hooks:
            for visit in chosen(wanted):
                visit.functions.append(function)
        for wanted, function in backward:
            for visit in chosen(wanted):
                visit.backward.append(function)
                visit.track = True
        if save:
            for visit in chosen(names_filter):
                visit.save, visit.track = True, visit.track or track
        for visit in list(visits.values()):
            for name in visit.point.needs:
                visits.setdefault(name, _Visit(self.points[name])).needed = True
        return [visits[name] for name in sorted(visits, key=self._order.__getitem__)]

    def _taps(self, visits: Iterable[_Visit]) -> Any:
        """What must be switched on in the attention modules for these visits."""
        wanted = {path: {"rows"} for path, site in self.sites.items() if site.taps.rows is not None}
        for visit in visits:
            if visit.point.tap is not None:
                path, tap = visit.point.tap
                wanted.setdefault(path, set()).add(tap)
        if not wanted:
            return nullcontext()
        return tapped([(self.sites[path], frozenset(names)) for path, names in wanted.items()])

    def _once(self, visits: Iterable[_Visit]) -> Any:
        """Refuses points of a tower or projector that runs several times."""
        first = {visit.point.stream: visit.point for visit in reversed(list(visits))}
        points = [first[stream] for stream in ("vision", "projector") if stream in first]
        places = [(point.name, point.tap[0] if point.tap else point.module) for point in points]
        return run_once([(name, self.module(path)) for name, path in places])

    def _prepared(self, visits: Iterable[_Visit]) -> dict[str, Any]:
        memo: dict[str, Any] = {}
        for visit in visits:
            prepare = getattr(visit.point.access, "prepare", None)
            if prepare is not None:
                memo.update(prepare())
        return memo

    def _visit(self, visit: _Visit, run: Pass, batch: Batch, step: int, *, copy: bool) -> Tensor:
        """Read a point's value, run its functions, write what they return; the value that goes on."""
        point = visit.point
        value = point.access.read(run)
        hook = Hook(point.name, point.layer, step, batch)
        if visit.functions and getattr(point.access, "in_place", False):
            # What a function keeps of it must not change when the next one writes.
            value = value.clone()
        for function in visit.functions:
            before = _version(value)
            new = function(value, hook)
            if new is None and _version(value) == before:
                continue
            # A value changed in place need not be the one that the model goes on with, so it is written too.
            new = value if new is None else new
            if not isinstance(new, Tensor) or new.shape != value.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise BadInputError(
                    f"the hook at {point.name!r} returned {got}; it must return None or a tensor of shape "
                    f"{tuple(value.shape)}"
                )
            new = new.to(value.device, value.dtype)
            point.access.write(run, new)
            value = new
        if visit.track:
            # A copy that the model goes on with: gradients of what was read are then gradients of what acts.
            value = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
            value.retain_grad()
            for function in visit.backward:
                value.register_hook(lambda grad, function=function: function(grad, hook))
            point.access.write(run, value)
        elif copy and (visit.save or visit.needed):
            # A saved tensor may be the very one that a later write in place changes.
            value = value.clone()
        if visit.needed:
            run.memo[point.name] = value
        return value

    def forward(
        self,
        batch: Batch,
        names_filter: NamesFilter = None,
        hooks: Sequence[HookSpec] = (),
        *,
        save: bool = False,
        stop_at_layer: int | None = None,
        backward: Sequence[HookSpec] = (),
        track: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """One forward pass: logits (None if stopped before them) and the saved activations."""
        visits = self._plan(batch, names_filter, hooks, save=save, backward=backward, track=track)
        if (track or backward) and not torch.is_grad_enabled():
            raise BadInputError(
                "gradients were asked for where PyTorch computes none (torch.no_grad); leave that block"
            )
        stop = None
        if stop_at_layer is not None:
            stop, limit = self._stop_point(stop_at_layer, batch)
            visits = self._before(visits, limit, named=names_filter is not None)
        copy = any(visit.functions for visit in visits)
        saved: dict[str, Tensor] = {}
        logits = None
        inputs = {**batch.inputs, **(options or {})}
        run = Pass(self.get, batch.length, self._prepared(visits))
        with self._once(visits), self._taps(visits), self.nnsight.trace(**inputs) as tracer:
            for visit in visits:
                value = self._visit(visit, run, batch, 0, copy=copy)
                if visit.save:
                    saved[visit.point.name] = value
            if stop is not None:
                # Waiting for the point is what lets the model run up to it.
                _ = self.get(stop).input
                tracer.stop()
            logits = nnsight.save(self.get("").output.logits)
        return logits, saved

    def _stop_point(self, stop_at_layer: int, batch: Batch) -> tuple[str, int]:
        """The module before which to stop, and the place in the order from which on nothing is reached."""
        n_layers = len(self._stops)
        layer = stop_at_layer + n_layers if stop_at_layer < 0 else stop_at_layer
        if not 0 <= layer <= n_layers:
            raise BadInputError(f"stop_at_layer={stop_at_layer} is outside this model's {n_layers} layers")
        limit = self._order[self._stops[layer].name] if layer < n_layers else self._last()
        # Layers of cross-attention do not run without an image.
        while layer < n_layers and not self._reached(self._stops[layer], batch):
            layer += 1
        return (self._stops[layer].module if layer < n_layers else self._after), limit

    def _last(self) -> int:
        """The place in the order behind the last block."""
        return 1 + max(index for name, index in self._order.items() if name.startswith("blocks."))

    def _before(self, visits: list[_Visit], limit: int, *, named: bool) -> list[_Visit]:
        """Visits that happen before the stop; names asked for explicitly that do not are refused."""
        kept = [visit for visit in visits if self._order[visit.point.name] < limit]
        late = [visit.point.name for visit in visits if self._order[visit.point.name] >= limit]
        if late and (named or not kept):
            raise BadInputError(
                f"{late[0]!r} is not reached when stopping before that layer; stop later or leave it out"
            )
        return kept

    def generate(self, batch: Batch, hooks: Sequence[HookSpec], options: dict[str, Any]) -> Any:
        """`generate` of the wrapped model with functions at hook points in every step; its own result."""
        visits = self._plan(batch, (), hooks, save=False)
        # Tower, projector, encoder run in the prefill alone. A worker that waited for them in a later step would end
        # there, and with it every later intervention: so they have a worker of their own.
        prefill = [visit for visit in visits if visit.point.once]
        each_step = [visit for visit in visits if not visit.point.once]
        # Position ids grow with every step: transformers counts them from the attention mask, as we do.
        inputs = {**{name: value for name, value in batch.inputs.items() if name != "position_ids"}, **options}
        prepared = self._prepared(visits)
        # What a cache that is given has of the prompts is not computed again.
        cache = options.get("past_key_values")
        first = batch.length - (0 if cache is None else cache.get_seq_length())
        result = None
        with warnings.catch_warnings(), torch.no_grad(), self._once(prefill), self._taps(visits):
            # The loop over steps has an open end, since nobody knows when the model will stop.
            warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")
            with self.nnsight.trace(fn="generate") as tracer:
                with tracer.invoke(**inputs):
                    run = Pass(self.get, batch.length, dict(prepared))
                    for visit in prefill:
                        self._visit(visit, run, batch, 0, copy=False)
                if each_step:
                    with tracer.invoke():
                        for step in tracer.iter[:]:
                            run = Pass(self.get, 1 if step else first, dict(prepared))
                            for visit in each_step:
                                self._visit(visit, run, batch, step, copy=False)
                with tracer.invoke():
                    result = nnsight.save(tracer.result)
        return result


def _version(value: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if value.is_inference() else value._version


def _sites(model: nn.Module, structure: Structure) -> Iterable[tuple[str, AttentionSite]]:
    """Every attention module of the model's stacks and connector, by path."""
    for own in structure.connector:
        module = model.get_submodule(own.path)
        owner = model.get_submodule(own.path.rpartition(".")[0] if own.before else structure.projector or own.path)
        yield own.path, AttentionSite(module, AttentionTaps(), configurations(owner, [module]), False, own.own_softmax)
    for stack in structure.stacks.values():
        blocks = [model.get_submodule(block.path) for block in stack.blocks]
        configs = configurations(model.get_submodule(stack.owner), blocks)
        for block in stack.blocks:
            for role in ("attn", "xattn"):
                if role in block.parts and block.patterns:
                    path, about = f"{block.path}.{block.parts[role]}", (stack.packed, block.own_softmax, block.n_heads)
                    yield path, AttentionSite(model.get_submodule(path), AttentionTaps(), configs, *about)
