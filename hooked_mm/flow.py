"""What the parts of a block do, found by running it: which module's output is added to the stream, and where.

Notation: x (b, p, d) enters the block, y leaves it, r = y - x. Every module inside is watched once; f is what a module
gives.

    sequential   r = α f + β g,  some module takes m = x + α f        (m: the stream in the middle)
    parallel     r = α f + β g,  no module takes m
    single       r = α f
    behind       y is what the second norm gives: this block normalises sums (BERT, BART)

Of two such modules the one that mixes positions is attention (or a mixer), the other the MLP: it is run again with its
first position changed, and what it gives elsewhere changes or stays. A norm is one by what it computes (`norms`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from hooked_mm.architectures import STREAM_SCALES
from hooked_mm.attention_own import by_interface
from hooked_mm.norms import find_norm_formula
from hooked_mm.structure import Wiring
from hooked_mm.weights import float32_copy

_CLOSE = 1e-4
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Call:
    """One call of a module inside a block: what went in and came out first, copied."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: Tensor | None
    after: Tensor | None

    @property
    def depth(self) -> int:
        """How many floors below the block."""
        return self.path.count(".")


@dataclass(frozen=True)
class Wired:
    """How a block is built, by what flows through it."""

    parts: dict[str, str]
    wiring: Wiring


@dataclass
class Run:
    """A block with the arguments that its model calls it with."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: list[Call] = field(default_factory=list)

    @property
    def stream(self) -> tuple[Tensor, Tensor] | None:
        """What enters and leaves, after `watch`."""
        own = next((call for call in self.calls if not call.path), None)
        return None if own is None or own.before is None or own.after is None else (own.before, own.after)

    def exact(self) -> Run:
        """The same with weights and arguments in float32 at least: in half precision sums hold too roughly."""
        if all(p.dtype not in _HALF for p in self.block.parameters()):
            return self
        return Run(float32_copy(self.block), _wide(self.args), {n: _wide(v) for n, v in self.kwargs.items()})

    def watch(self) -> None:
        """Run the block and keep what every module inside it takes and gives."""
        handles = [
            module.register_forward_hook(self._note(name), with_kwargs=True)
            for name, module in self.block.named_modules()
        ]
        entering = [
            module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
            for name, module in self.block.named_modules()
        ]
        self._inputs: dict[str, Tensor | None] = {}
        try:
            with torch.no_grad():
                self.block(*_copied(self.args), **{name: _copied(value) for name, value in self.kwargs.items()})
        finally:
            for handle in (*handles, *entering):
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = first_tensor((*args, *kwargs.values()))
            self._inputs[path] = None if value is None else value.clone()

        return note

    def _note(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            value = first_tensor(out)
            after = None if value is None else value.clone()
            self.calls.append(Call(path, module, args, kwargs, self._inputs.get(path), after))

        return note


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of floating point in nested tuples."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, tuple | list):
        return next((found for item in value if (found := first_tensor(item)) is not None), None)
    return None


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _HALF:
        return value.float()
    return tuple(map(_wide, value)) if isinstance(value, tuple) else value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value


def captured(block: nn.Module, run: Callable[[], Any]) -> Run | None:
    """The arguments that a block is called with when `run` is; None if it is not reached or something fails."""
    found: list[Run] = []

    class _Enough(Exception):
        pass

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Run(module, _copied(args), {name: _copied(value) for name, value in kwargs.items()}))
        raise _Enough

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    except Exception:
        # Whatever a model needs besides: the names must do, and what they do not say is refused.
        pass
    finally:
        handle.remove()
    return found[0] if found else None


def wire(run: Run, names: Mapping[str, str]) -> Wired | None:
    """How a block is built; None if no sum of its parts' outputs is what it adds.

    Args:
        run: The block with its arguments.
        names: Role -> path, by names: taken for what lies inside attention and MLP, as far as it does lie there.
    """
    try:
        run = run.exact()
        run.watch()
    except Exception:
        return None
    stream = run.stream
    if stream is None or stream[0].shape != stream[1].shape or stream[0].ndim != 3:
        return None
    x, y = (value.double() for value in stream)
    factor = next((getattr(run.block, name) for name in STREAM_SCALES if hasattr(run.block, name)), None)
    y = y if factor is None else y / factor.double()
    if _behind(run.calls, names, y):
        return Wired(dict(names), "post")
    third = next((call for call in run.calls if call.path == names.get("extra")), None)
    summed = [call for call in run.calls if call is not third]
    found = _addends(summed, x, y - x if third is None else y - x - _flat(third.after, x))
    if found is None:
        return None
    parts: dict[str, str] = {"block": ""} if third is None else {"block": "", "extra": third.path}
    calls = [call for call in run.calls if call.path]
    # Attention to keys that an earlier block made mixes nothing of this block's own input.
    sources = [(call, _source(call, calls)) for call, _ in found]
    mixers = [call for call, source in sources if _mixes(source) or source.path == names.get("attn")]
    first = found[0][0]
    mid = _reader(calls, x + found[0][1] * _flat(first.after, x)) if len(found) == 2 else None
    if len(found) == 2 and (len(mixers) != 1 or mixers[0] is not first) and mid is not None:
        return None
    if any(abs(factor - 1) > _CLOSE for _, factor in found):
        # What multiplies is a number that no table names.
        return None
    inputs = [x] if mid is None else [x, x + _flat(first.after, x)]
    for index, (call, _) in enumerate(found):
        role = "attn" if call in mixers else "mlp"
        source = _source(call, calls)
        stands = inputs[min(index, len(inputs) - 1)]
        norm = _norm_on(calls, stands)
        pattern = _patterned(source, names)
        role = "mixer" if role == "attn" and not pattern else role
        parts[role] = source.path
        if source is not call:
            parts[f"{'mlp' if role == 'mlp' else 'attn'}_after"] = call.path
        if norm is not None:
            parts["ln2" if index == 1 and mid is not None else "ln1"] = norm.path
        if role == "mlp":
            parts |= _mlp_parts(source, calls, names)
        elif pattern:
            parts |= _attention_parts(source, calls, names)
    if len(found) == 1:
        return Wired(parts, "single")
    if mid is None:
        return Wired(parts, "parallel") if "ln1" in parts else None
    return Wired(parts, "pre" if {"ln1", "ln2"} <= set(parts) else "after")


def _behind(calls: list[Call], names: Mapping[str, str], y: Tensor) -> bool:
    """Whether the block ends with its second norm, and every part has a name."""
    if not {"ln1", "ln2", "attn", "mlp"} <= set(names):
        return False
    return any(call.path == names["ln2"] and _same(call.after, y) for call in calls)


def _flat(value: Tensor | None, like: Tensor) -> Tensor:
    assert value is not None
    return value.double().reshape(like.shape)


def _same(one: Tensor | None, other: Tensor) -> bool:
    if one is None or one.numel() != other.numel() or one.shape[-1] != other.shape[-1]:
        return False
    gap = (one.double().reshape(other.shape) - other).abs().max()
    return bool(gap <= _CLOSE * other.abs().max())


def _addends(calls: list[Call], x: Tensor, r: Tensor) -> list[tuple[Call, float]] | None:
    """The one or two modules whose outputs, times a number each, are what the block adds; the outermost ones."""
    candidates: list[Call] = []
    for call in sorted((call for call in calls if call.path), key=lambda call: call.depth):
        after = call.after
        if after is None or after.shape[-1] != x.shape[-1] or after.numel() != x.numel():
            continue
        if any(_same(after, value) for value in (x, x + r, *(_flat(c.after, x) for c in candidates))):
            continue
        candidates.append(call)
    order = {id(call): place for place, call in enumerate(calls)}
    candidates.sort(key=lambda call: order[id(call)])
    for size in (1, 2):
        for chosen in combinations(candidates, size):
            basis = torch.stack([_flat(call.after, x).flatten() for call in chosen], dim=1)
            factors = torch.linalg.lstsq(basis, r.flatten()[:, None]).solution[:, 0]
            # What rounding leaves of a difference is as large as the stream.
            if (basis @ factors - r.flatten()).abs().max() <= _CLOSE * r.abs().max() + 1e-6 * (x + r).abs().max():
                return list(zip(chosen, factors.tolist(), strict=True))
    return None


def _reader(calls: list[Call], value: Tensor) -> Call | None:
    """The first module that takes this value."""
    return next((call for call in calls if _same(call.before, value)), None)


def _is_norm(call: Call) -> bool:
    return find_norm_formula(call.module) is not None


def _norm_on(calls: list[Call], value: Tensor) -> Call | None:
    return next((call for call in calls if _is_norm(call) and _same(call.before, value)), None)


def _source(call: Call, calls: list[Call]) -> Call:
    """The module behind which a norm stands, if what is added comes out of a norm; else itself."""
    if not _is_norm(call) or call.before is None:
        return call
    same = [c for c in calls if c is not call and c.before is not None and _same(c.after, call.before.double())]
    return min(same, key=lambda c: c.depth) if same else call


def _mixes(call: Call) -> bool:
    """Whether a change at the first position reaches others."""

    def changed(value: Any, done: list[bool]) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and not done:
            done.append(True)
            value = value.clone()
            value[:, 0] += 1
        return value

    done: list[bool] = []
    args = tuple(changed(value, done) for value in call.args)
    kwargs = {name: changed(value, done) for name, value in call.kwargs.items()}
    if not done:
        return False
    with torch.no_grad():
        after = first_tensor(call.module(*args, **kwargs))
    before = call.after
    if after is None or before is None or after.shape != before.shape or after.ndim != 3:
        return False
    return not torch.allclose(after[:, 1:], before[:, 1:], atol=_CLOSE, rtol=_CLOSE)


def _inside(owner: Call, calls: list[Call]) -> list[Call]:
    return [call for call in calls if call.path.startswith(f"{owner.path}.")]


def _linear(call: Call) -> bool:
    weight = getattr(call.module, "weight", None)
    return weight is not None and weight.ndim == 2 and not _is_norm(call)


def looked_into(attention: nn.Module) -> bool:
    """Whether an attention module runs by transformers' attention interface, so that its pattern can be tapped."""
    source = sys.modules[type(attention).__module__]
    return hasattr(source, "ALL_ATTENTION_FUNCTIONS") and by_interface(attention)


def _patterned(source: Call, names: Mapping[str, str]) -> bool:
    """Whether a mixing module is attention with heads, rather than a convolution or a state space."""
    if names.get("mixer") == source.path:
        return looked_into(source.module)
    return any(
        hasattr(source.module, name) for name in ("num_heads", "head_dim", "num_attention_heads", "n_heads")
    ) or (names.get("attn") == source.path)


def _attention_parts(source: Call, calls: list[Call], names: Mapping[str, str]) -> dict[str, str]:
    """q, k, v and o of an attention module: by names, else what takes its input, in order, and what gives its output.

    Only linear maps are meant.
    """
    known = {
        r: p
        for r in ("q", "q_a", "q_a_norm", "k", "v", "qkv", "o", "o_norm")
        if (p := names.get(r, "")).startswith(f"{source.path}.")
    }
    if known:
        return known
    linear = [call for call in _inside(source, calls) if _linear(call)]
    entering = source.before
    assert entering is not None
    assert source.after is not None
    reading = [call for call in linear if _same(call.before, entering.double())]
    found = _giving("o", linear, source.after)
    # Latents, too, read what attention stands on; queries are as wide as what the last projection takes.
    wide = [_wide_of(call.before) for call in linear if call.path == found.get("o")]
    sizes = [_wide_of(call.after) for call in reading]
    if len(reading) == 3 and sizes[:1] == wide and sizes[1] == sizes[2]:
        found |= dict(zip("qkv", (call.path for call in reading), strict=True))
    elif len(reading) == 1 and wide and sizes[0] == 3 * wide[0]:
        found["qkv"] = reading[0].path
    return found


def _mlp_parts(source: Call, calls: list[Call], names: Mapping[str, str]) -> dict[str, str]:
    """Gate, up and down projection of an MLP: by names; else the gate is what an activation function takes."""
    known = {r: names[r] for r in ("mlp_gate", "mlp_up", "mlp_gate_up", "mlp_down", "mlp_norm") if r in names}
    if known and names.get("mlp") == source.path:
        return known
    inside = _inside(source, calls)
    linear = [call for call in inside if _linear(call)]
    entering = source.before
    assert entering is not None
    assert source.after is not None
    reading = [call for call in linear if _same(call.before, entering.double())]
    found = _giving("mlp_down", linear, source.after)
    bare = [call for call in inside if call.before is not None and not any(True for _ in call.module.parameters())]
    gates = [call for call in reading if any(_same(act.before, _double(call.after)) for act in bare)]
    # A gate is as wide as the neurons; twice as wide it is two in one, whose order is not known.
    neurons = [_wide_of(call.before) for call in linear if call.path == found.get("mlp_down")]
    if any(_wide_of(call.after) not in neurons for call in reading):
        reading = []
    if len(reading) == 1:
        found["mlp_gate"] = reading[0].path
    elif len(reading) == 2 and len(gates) == 1:
        found["mlp_gate"] = gates[0].path
        found["mlp_up"] = next(call.path for call in reading if call is not gates[0])
    return found if "mlp_down" in found else {}


def _giving(role: str, calls: list[Call], value: Tensor) -> dict[str, str]:
    """The last of these calls that gives a value, in this role."""
    found = [call.path for call in calls if _same(call.after, value.double())]
    return {role: found[-1]} if found else {}


def _wide_of(value: Tensor | None) -> int:
    return _double(value).shape[-1]


def _double(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.double()
