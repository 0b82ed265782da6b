"""Interventions as values: what to change, where, and when, made once and used wherever hook functions are.

    push = Add("blocks.3.hook_resid_post", vector, alpha=4.0, at="generated")
    blind = ProjectOut("projector.hook_out", directions)
    with model.hooks([push + blind.when(Above(direction, 2.0))]):
        model.generate(batch)

In the formulas x is the activation at one position (and head), u a direction divided by its length. Positions that a
rule (`at`, see `positions`) does not choose stay bit for bit as they are; the value's dtype and device are kept, sums
over a vector are taken in float32 or more. Vectors and numbers may be one per sample, the samples in front.
The objects are frozen and hold no state of a run: what a run must remember lives in what `specs()` returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.conditions import Condition
from hooked_mm.errors import BadInputError
from hooked_mm.positions import ALL, At, as_rule
from hooked_mm.runner import Hook, HookFunction, HookSpec, NamesFilter
from hooked_mm.value_layout import has_heads, head_mask, layout, row_layout, stream_of, whole_numbers
from hooked_mm.vectors import Spread, checked, checked_number, orthonormal, shown, unit, wide


@dataclass(frozen=True)
class Act:
    """What an intervention does at a point: `function(value, hook, where)`, where `where` (rows, positions) narrows the
    positions further and None does not. `looks`: it only reads."""

    point: NamesFilter
    function: Callable[[Tensor, Hook, Tensor | None], Tensor | None]
    looks: bool = False


class Intervention(ABC):
    """A change to a run as a value. `a + b` does both, in this order; `a.when(condition)` does it conditionally."""

    @abstractmethod
    def acts(self) -> list[Act]:
        """What to do at which points, in order; with fresh memory for the runs they will be used in."""

    def specs(self) -> list[tuple[NamesFilter, HookFunction]]:
        """Pairs (names, function) for `run_with_hooks`, `hooks` and whatever takes hook functions."""

        def alone(act: Act) -> HookFunction:
            return lambda value, hook: act.function(value, hook, None)

        return [(act.point, alone(act)) for act in self.acts()]

    def when(self, condition: Condition) -> When:
        """This intervention, only where the condition holds."""
        return When(self, condition)

    def __add__(self, other: Intervention) -> Compose:
        if not isinstance(other, Intervention):
            return NotImplemented
        mine, theirs = (item.parts if isinstance(item, Compose) else (item,) for item in (self, other))
        return Compose((*mine, *theirs))


@dataclass(frozen=True, eq=False, repr=False)
class Compose(Intervention):
    """Several interventions. At a shared point they run in this order, each on what the one before it left."""

    parts: tuple[Intervention, ...]

    def acts(self) -> list[Act]:
        """What every part does, in order."""
        return [act for part in self.parts for act in part.acts()]

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


@dataclass
class _Answer:
    """What a condition said in the present run, and at which step of which batch."""

    step: int
    batch: Batch
    mask: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class When(Intervention):
    """An intervention that acts only where a condition holds (see `conditions`).

    Answers are kept from where the condition looks to where the intervention acts, and replaced at every new run; those
    about a whole sample are given at the prompt and hold for the generation, for all beams of the sample.
    """

    intervention: Intervention
    condition: Condition

    def acts(self) -> list[Act]:
        """The condition's looks, and what the intervention does, narrowed by the answers."""
        condition, answers = self.condition, dict[str, _Answer]()

        def look(value: Tensor, hook: Hook, where: Tensor | None) -> None:
            if condition.over == "position" or hook.step == 0:
                answers[hook.name] = _Answer(hook.step, hook.batch, condition.judge(value, hook))

        def narrowed(act: Act) -> Act:
            if act.looks:
                return act

            def function(value: Tensor, hook: Hook, where: Tensor | None) -> Tensor | None:
                allowed = self._allowed(answers.get(condition.point or hook.name), value, hook)
                return act.function(value, hook, allowed if where is None else allowed & where.to(allowed.device))

            return Act(act.point, function)

        acts = self.intervention.acts()
        places = [act.point for act in acts if not act.looks] if condition.point is None else [condition.point]
        return [*(Act(place, look, looks=True) for place in places), *map(narrowed, acts)]

    def _allowed(self, answer: _Answer | None, value: Tensor, hook: Hook) -> Tensor:
        """The answer as a mask over the rows and positions of the value at hand."""
        each = self.condition.over == "position"
        if answer is None or answer.batch is not hook.batch or (each and answer.step != hook.step):
            raise BadInputError(
                f"{self.condition!r} has not been judged when {hook.name!r} is reached; its point must come earlier in "
                "the model (see the order of model.hook_names)"
            )
        # Attention patterns are (rows, heads, queries, keys); what is narrowed there are the queries.
        pattern = hook.name.endswith("hook_pattern")
        here = row_layout(hook, value.shape[0], value.shape[2]) if pattern else layout(hook, value.shape)
        if not each:
            return here.pick(answer.mask.to(here.modality.device), "a condition's answer").to(value.device)
        place = self.condition.point or hook.name
        mask = answer.mask if here.patches else answer.mask[:, -here.shape[1] :]
        if stream_of(place) != stream_of(hook.name) or tuple(mask.shape) != here.shape:
            raise BadInputError(
                f"{self.condition!r} was judged on positions {tuple(answer.mask.shape)} of {place!r}, which are not "
                f"those of {hook.name!r}, {here.shape}; judge whole samples instead: over='any' or over='mean'"
            )
        return mask.to(value.device)

    def __repr__(self) -> str:
        inner = repr(self.intervention)
        return f"{f'({inner})' if isinstance(self.intervention, Compose) else inner}.when({self.condition!r})"


@dataclass(frozen=True, eq=False, repr=False)
class AtPoint(Intervention):
    """An intervention on the vectors of one kind of point; subclasses give the formula.

    Attributes:
        point: Name, glob, list of those or callable on names. Any point whose last dimension is a vector: (rows,
            positions, d), with heads (rows, positions, heads, d_head), in a packed tower (positions, d).
        at: Which positions: a rule, or a short form of one (`as_rule`).
        heads: Which heads, one or several; None for all. Only at points that have heads.
    """

    point: NamesFilter
    at: At = field(default=ALL, kw_only=True)
    heads: int | Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", as_rule(self.at))
        if self.heads is not None:
            object.__setattr__(self, "heads", whole_numbers("heads", self.heads))

    @abstractmethod
    def change(self, spread: Spread) -> Tensor:
        """What becomes of `spread.value` (rows, positions[, heads], d), were all of it chosen."""

    def acts(self) -> list[Act]:
        """One act at the point."""
        return [Act(self.point, self.apply)]

    def apply(self, value: Tensor, hook: Hook, where: Tensor | None = None) -> Tensor:
        """The changed activation.

        Args:
            value: The activation.
            hook: Where it was met.
            where: (rows, positions), narrows the positions further.

        Raises:
            BadInputError: If positions, heads or vectors do not fit the activation.
        """
        plan = layout(hook, value.shape)
        mask = as_rule(self.at).mask(plan).to(value.device)
        if where is not None:
            mask = mask & where.to(value.device)
        heads = has_heads(hook.name)
        unpacked = value.reshape(*plan.shape, *value.shape[-1 - heads :])
        chosen = mask[:, :, None]
        if heads:
            chosen = chosen[..., None] & head_mask(self.heads, unpacked.shape[2], hook.name, value.device)[:, None]
        elif self.heads is not None:
            raise BadInputError(f"heads={self.heads!r} was given, but {hook.name!r} has no heads; leave it out")
        new = self.change(Spread(unpacked, plan))
        return torch.where(chosen, new.to(value.dtype), unpacked).reshape(value.shape)

    def __repr__(self) -> str:
        return shown(self)


@dataclass(frozen=True, eq=False, repr=False)
class Add(AtPoint):
    """x + alpha v; relative: x + alpha |x| u (steering; Turner et al. 2023, arXiv 2308.10248).

    With keep_norm y = x + alpha v becomes y |x| / |y|.

    Attributes:
        vector: v, (d,) or (samples, d).
        alpha: A number, or (samples,).
        relative: Only the direction of v counts, and alpha is a share of the activation's own length.
        keep_norm: The sum is given the length that the activation had.
    """

    vector: Float[Tensor, "*samples d"]
    alpha: float | Float[Tensor, " samples"] = 1.0
    relative: bool = field(default=False, kw_only=True)
    keep_norm: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        vector = checked("vector", self.vector, (1, 2))
        object.__setattr__(self, "vector", unit("vector", vector) if self.relative else vector)
        object.__setattr__(self, "alpha", checked_number("alpha", self.alpha))

    def change(self, spread: Spread) -> Tensor:
        """x + alpha v."""
        shift = wide(spread.vector("vector", self.vector)) * spread.number("alpha", self.alpha)
        if self.relative:
            shift = shift * wide(spread.value).norm(dim=-1, keepdim=True)
        if not self.keep_norm:
            return spread.value + shift.to(spread.value.dtype)
        total = wide(spread.value) + shift
        length, new = (x.norm(dim=-1, keepdim=True) for x in (wide(spread.value), total))
        return total * (length / new.clamp_min(torch.finfo(total.dtype).tiny))


@dataclass(frozen=True, eq=False, repr=False)
class Replace(AtPoint):
    """v instead of x: a number (0 for zero ablation), a vector (the mean for mean ablation), or one per sample.

    Attributes:
        value: A number, (d,) or (samples, d).
    """

    value: float | Float[Tensor, "*samples d"]

    def __post_init__(self) -> None:
        super().__post_init__()
        given = checked("value", self.value, (0, 1, 2))
        object.__setattr__(self, "value", float(given) if given.ndim == 0 else given)

    def change(self, spread: Spread) -> Tensor:
        """v."""
        if not isinstance(self.value, Tensor):
            return torch.full_like(spread.value, self.value)
        return spread.vector("value", self.value).to(spread.value.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(AtPoint):
    """factor x.

    Attributes:
        factor: A number, or (samples,).
    """

    factor: float | Float[Tensor, " samples"]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "factor", checked_number("factor", self.factor))

    def change(self, spread: Spread) -> Tensor:
        """factor x."""
        return wide(spread.value) * spread.number("factor", self.factor)


@dataclass(frozen=True, eq=False, repr=False)
class ProjectOut(AtPoint):
    """x - B^T B x, where B is an orthonormal basis of the directions' span (Arditi et al. 2024, arXiv 2406.11717).

    Attributes:
        directions: (d,), or (k, d), or (samples, k, d); they need be neither orthogonal nor independent.
    """

    directions: Float[Tensor, "*k d"]
    _basis: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "directions", checked("directions", self.directions, (1, 2, 3)))
        object.__setattr__(self, "_basis", orthonormal("directions", self.directions))

    def change(self, spread: Spread) -> Tensor:
        """x - B^T B x."""
        value = wide(spread.value)
        basis = spread.vector("directions", self._basis, own=2).to(value.dtype)
        if basis.ndim == 2:
            return value - (value @ basis.T) @ basis
        return value - ((value[..., None, :] @ basis.mT) @ basis).squeeze(-2)


@dataclass(frozen=True, eq=False, repr=False)
class SetComponent(AtPoint):
    """x + (to - x·u) u: the component along the direction becomes `to`, all else stays.

    Attributes:
        direction: (d,) or (samples, d); only its direction counts.
        to: The new component, a number or (samples,).
    """

    direction: Float[Tensor, "*samples d"]
    to: float | Float[Tensor, " samples"]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", unit("direction", self.direction))
        object.__setattr__(self, "to", checked_number("to", self.to))

    def change(self, spread: Spread) -> Tensor:
        """x + (to - x·u) u."""
        value = wide(spread.value)
        direction = spread.vector("direction", self.direction).to(value.dtype)
        return value + (spread.number("to", self.to) - (value * direction).sum(dim=-1, keepdim=True)) * direction


@dataclass(frozen=True, eq=False, repr=False)
class Rotate(AtPoint):
    """Turns x in the plane of two directions, length kept (angular steering; Vu and Nguyen 2025, arXiv 2510.26243).

    With e1 = u(first), e2 = what of `second` is orthogonal to e1, made of length 1, and components a = x·e1, b = x·e2:
    x + (a' - a) e1 + (b' - b) e2, where (a', b') is (a, b) turned by the angle from e1 towards e2; or, with `target`,
    (r cos angle, r sin angle), r = |(a, b)|: the plane's part then points at the angle, wherever it pointed before.

    Attributes:
        first: (d,), the angle 0.
        second: (d,), on the side of positive angles; not parallel to `first`.
        angle: In radians, a number or (samples,).
        target: Whether `angle` is where to arrive instead of how far to turn.
    """

    first: Float[Tensor, " d"]
    second: Float[Tensor, " d"]
    angle: float | Float[Tensor, " samples"]
    target: bool = field(default=False, kw_only=True)
    _plane: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        first, second = (unit(name, checked(name, getattr(self, name), (1,))) for name in ("first", "second"))
        if first.shape != second.shape:
            raise BadInputError(f"first has length {first.shape[0]}, second {second.shape[0]}; they must be the same")
        dtype = torch.promote_types(first.dtype, second.dtype)
        first, second = first.double(), second.to(first.device, torch.float64)
        rest = second - (second @ first) * first
        if float(rest.norm()) < 1e-4:
            raise BadInputError("first and second are parallel, so they span no plane to turn in")
        rest = rest / rest.norm()
        object.__setattr__(self, "first", checked("first", self.first, (1,)))
        object.__setattr__(self, "second", checked("second", self.second, (1,)))
        object.__setattr__(self, "angle", checked_number("angle", self.angle))
        object.__setattr__(self, "_plane", torch.stack([first, rest]).to(dtype))

    def change(self, spread: Spread) -> Tensor:
        """x + (a' - a) e1 + (b' - b) e2."""
        value = wide(spread.value)
        plane = spread.vector("first", self._plane, own=2).to(value.dtype)
        part = value @ plane.T
        angle = torch.as_tensor(spread.number("angle", self.angle), device=value.device, dtype=value.dtype)
        cos, sin = angle.cos(), angle.sin()
        if self.target:
            length = part.norm(dim=-1, keepdim=True)
            new = torch.cat([length * cos, length * sin], dim=-1)
        else:
            a, b = part[..., :1], part[..., 1:]
            new = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        return value + (new - part) @ plane


HookLike = HookSpec | Intervention


def expand(hooks: Sequence[HookLike]) -> list[HookSpec]:
    """Pairs of names and functions, interventions resolved into theirs: once per run or block, for their memory."""
    made: list[HookSpec] = []
    for hook in hooks:
        made += hook.specs() if isinstance(hook, Intervention) else [hook]
    return made
