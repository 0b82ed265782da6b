"""A grid of settings: what is tried of every vector, and which gates fit it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from hooked_mm.errors import BadInputError
from hooked_mm.steering_vector import SteeringVector
from steering.gate import Gate
from steering.setting import ANSWERING, Setting


@dataclass(frozen=True)
class Grid:
    """What is tried of every vector.

    Attributes:
        alphas: How much.
        at: Where, see `setting.positions`.
        operations: How, see the table in `setting`.
        gated: Without the gates that are given, with them, or both.
    """

    alphas: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
    at: Sequence[str] = (ANSWERING,)
    operations: Sequence[str] = ("add",)
    gated: Sequence[bool] = (False,)

    def settings(self, vectors: Sequence[SteeringVector], gates: Sequence[Gate] = ()) -> list[Setting]:
        """Every combination; of gates of one name that with each vector which judges last before it, or at its point.

        Raises:
            BadInputError: If nothing is left to try, or gates are asked for and none is given.
        """
        if any(self.gated) and not gates:
            raise BadInputError("gated settings are asked for, but there is no gate; make one (see learn_gate)")
        found = []
        for vector, at, how, gated in product(vectors, self.at, self.operations, self.gated):
            fitting = fitting_gates(vector, gates) if gated else [None]
            alphas = (1.0,) if how == "project_out" else self.alphas
            found += [Setting(vector, alpha, at, how, gate) for gate in fitting for alpha in alphas]
        if not found:
            raise BadInputError(
                f"{len(vectors)} vectors, {len(self.alphas)} alphas, {len(self.at)} rules of positions, "
                f"{len(self.operations)} operations and {len(gates)} gates make no setting; give at least one of each, "
                "and gates that stand no later than the vectors"
            )
        return found


def fitting_gates(vector: SteeringVector, gates: Sequence[Gate]) -> list[Gate]:
    """By name, the last gate that judges no later than the vector acts."""
    found: dict[str, tuple[int, Gate]] = {}
    for gate in gates:
        point = gate.condition.point
        layer = -1 if point is None else layer_of(point, -1)
        if vector.layer is None or layer <= vector.layer:
            best = found.get(gate.name)
            found[gate.name] = (layer, gate) if best is None or layer > best[0] else best
    return [gate for _, gate in found.values()]


def layer_of(point: str, outside: int) -> int:
    """The block of a point, or `outside`."""
    layer = SteeringVector(torch.zeros(1), point).layer
    return outside if layer is None else layer
