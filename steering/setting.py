"""A setting: which vector, how much of it, where, when and how; and many settings side by side in one batch.

| operation | what becomes of x (alpha: a; the vector: v, of length 1: u) |
|---|---|
| `add` | x + a v |
| `add_keep_norm` | (x + a v) made as long as x |
| `project_out` | x - (x.u) u; a must be 1 |
| `set` | x + (a - x.u) u |
| `rotate` | x turned by a, in radians, in the plane of `second` and v, from `second` towards v, as long as before |

Rows of a batch may each have their own setting: those at one point that act alike are one intervention with a vector
per row, so many alphas and vectors share a forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hooked_mm.errors import BadInputError, unknown
from hooked_mm.interventions import Add, AtPoint, Intervention, ProjectOut, Rotate, SetComponent
from hooked_mm.positions import PositionRule, Positions, as_rule
from hooked_mm.steering_vector import SteeringVector
from steering.concept_moves import ConceptMoves
from steering.gate import Gate, digest

OPERATIONS = ("add", "add_keep_norm", "project_out", "set", "rotate")

ANSWERING = "last_prompt+generated"
"""From where the answer's first token is predicted on: all that is said is steered, nothing that was asked."""


def positions(at: str) -> PositionRule:
    """The rule of words joined by `+` (`"last_prompt+generated"`), `"from N"` among them: from the own token N on.

    Raises:
        BadInputError: If a word is unknown.
    """
    rule: PositionRule | None = None
    for word in at.split("+"):
        word = word.strip()
        start = word.removeprefix("from ")
        if start != word and start.lstrip("-").isdigit():
            one: PositionRule = Positions(start=int(start))
        else:
            one = as_rule(word)
        rule = one if rule is None else rule | one
    assert rule is not None
    return rule


@dataclass(frozen=True, eq=False)
class Setting:
    """One way to steer; `Setting()` is the model as it is.

    Attributes:
        vector: The direction, or one for every concept (only to `add`); None for none.
        alpha: How much, see the table of operations.
        at: Where, as `positions` reads it.
        operation: What is done.
        gate: For which samples; None for all.
        second: Of `rotate`: what is turned away from, towards the vector.
        also: Further settings at the same time, each with its own point, gate and amount.

    Raises:
        BadInputError: For an unknown operation or position, or an operation that lacks what it needs.
    """

    vector: SteeringVector | ConceptMoves | None = None
    alpha: float = 1.0
    at: str = ANSWERING
    operation: str = "add"
    gate: Gate | None = None
    second: SteeringVector | None = None
    also: tuple[Setting, ...] = ()

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise unknown("operation", self.operation, OPERATIONS)
        positions(self.at)
        if self.operation == "project_out" and self.alpha != 1:
            raise BadInputError(f"alpha={self.alpha} with 'project_out', which has no amount; leave alpha at 1")
        if (self.operation == "rotate") != (self.second is not None):
            raise BadInputError(
                f"operation={self.operation!r} with second={self.second!r}: 'rotate' needs the vector to turn away "
                "from, and nothing else takes one"
            )
        if isinstance(self.vector, ConceptMoves) and self.operation != "add":
            raise BadInputError(f"operation={self.operation!r}; a vector for every concept can only be added")
        if self.vector is not None and self.second is not None and self.vector.hook != self.second.hook:
            raise BadInputError(
                f"vectors of {self.vector.hook!r} and {self.second.hook!r} span no plane; give two of one hook point"
            )

    @property
    def parts(self) -> list[Setting]:
        """Itself and what acts also, without those that have no vector."""
        own = [replace(self, also=())] if self.vector is not None else []
        return [*own, *(part for other in self.also for part in other.parts)]

    def describe(self) -> dict[str, Any]:
        """The setting as tables and manifests show it."""
        parts = self.parts
        names = [part.vector.name or part.vector.kind for part in parts if part.vector is not None]
        first = parts[0] if parts else self
        return {
            "vector": " + ".join(names),
            "kind": "none" if first.vector is None else first.vector.kind,
            "hook": None if first.vector is None else first.vector.hook,
            "layer": None if first.vector is None else first.vector.layer,
            "alpha": float(first.alpha) if parts else 0.0,
            "at": first.at,
            "operation": first.operation,
            "gate": "" if first.gate is None else first.gate.name,
        }

    def fingerprint(self) -> dict[str, Any]:
        """What tells it from any other setting: its description and a digest of its numbers."""
        return {**self.describe(), "parts": [part._digest() for part in self.parts]}

    def _digest(self) -> list[Any]:
        """Of one part: what it is called, and digests that other vectors and gates do not have."""
        vectors = [digest(v.values) for v in (self.vector, self.second) if v is not None]
        return [self.describe(), vectors, None if self.gate is None else self.gate.fingerprint()]


@dataclass
class _Group:
    """Parts of settings that one intervention can do, and the row that each belongs to."""

    parts: list[Setting] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def side_by_side(settings: Sequence[Setting]) -> list[Intervention]:
    """The interventions of a batch whose row i is steered by settings[i].

    Conditions look before anything at their point is changed by a setting of the same row only where they stand at an
    earlier point; give gates an earlier point than what acts `also`.

    Returns:
        One intervention for each point, operation, rule of positions and gate.
    """
    groups: dict[tuple[Any, ...], _Group] = {}
    for row, setting in enumerate(settings):
        steps: Counter[str] = Counter()
        for part in setting.parts:
            assert part.vector is not None
            hook = part.vector.hook
            turns: tuple[Any, ...] = (id(part.vector), id(part.second)) if part.operation == "rotate" else ()
            if isinstance(part.vector, ConceptMoves):
                turns = (id(part.vector), part.alpha)
            key = (steps[hook], hook, part.operation, part.at, id(part.gate) if part.gate else None, turns)
            steps[hook] += 1
            group = groups.setdefault(key, _Group())
            group.parts.append(part)
            group.rows.append(row)
    # What a setting does at one point follows each other, whatever settings beside it do there first.
    ordered = sorted(groups, key=lambda key: int(key[0]))
    return [_together(groups[key], len(settings)) for key in ordered]


def _together(group: _Group, count: int) -> Intervention:
    """One intervention for the rows of a group."""
    first = group.parts[0]
    assert first.vector is not None
    hook, operation = first.vector.hook, first.operation
    rule = positions(first.at)
    # Adding nothing changes nothing; whatever else is done, other rows have no part in.
    own = rule if len(set(group.rows)) == count else rule & Positions(sample=tuple(group.rows))
    if isinstance(first.vector, ConceptMoves):
        moved = first.vector.intervention(first.alpha, own)
        return moved if first.gate is None else first.gate.of(moved)
    vectors = _by_row([part.vector.values for part in group.parts if part.vector is not None], group.rows, count)
    alphas = _by_row([torch.tensor(float(part.alpha)) for part in group.parts], group.rows, count)
    made: AtPoint
    if operation == "add":
        made = Add(hook, alphas[:, None] * vectors, at=rule)
    elif operation == "add_keep_norm":
        made = Add(hook, alphas[:, None] * vectors, at=own, keep_norm=True)
    elif operation == "project_out":
        made = ProjectOut(hook, _filled(vectors, group.rows)[:, None], at=own)
    elif operation == "set":
        made = SetComponent(hook, _filled(vectors, group.rows), alphas, at=own)
    else:
        assert first.second is not None
        made = Rotate(hook, first.second.values, first.vector.values, alphas, at=own)
    return made if first.gate is None else first.gate.of(made)


def _by_row(values: Sequence[Tensor], rows: Sequence[int], count: int) -> Tensor:
    """`values` at their rows, zeros elsewhere."""
    out = torch.zeros(count, *values[0].shape)
    out[list(rows)] = torch.stack(list(values)).float()
    return out


def _filled(vectors: Tensor, rows: Sequence[int]) -> Tensor:
    """With some direction in rows that are not steered, where none would be refused."""
    out = vectors.clone()
    others = [row for row in range(len(vectors)) if row not in set(rows)]
    out[others] = vectors[rows[0]]
    return out
