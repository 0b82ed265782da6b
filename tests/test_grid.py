"""Grids of settings: every combination, and gates that fit."""

from __future__ import annotations

import pytest
import torch

from hooked_mm.conditions import Above
from hooked_mm.errors import BadInputError
from hooked_mm.positions import LAST_PROMPT
from hooked_mm.steering_vector import SteeringVector
from steering.gate import Gate
from steering.grid import Grid, fitting_gates


def hook(layer: int) -> str:
    """Behind a block."""
    return f"blocks.{layer}.hook_resid_post"


def test_a_grid_is_every_combination() -> None:
    """Gates no later than the vector; what has no amount is tried once."""
    made = [SteeringVector(torch.ones(8), hook(layer), "coarse", f"v{layer}") for layer in (1, 3)]
    gates = [Gate(Above(torch.ones(8), 0.0, hook(layer), "mean", LAST_PROMPT), f"g{layer}") for layer in (0, 2)]
    grid = Grid((1.0, 2.0), ("all", "generated"), ("add", "project_out"), (False, True))
    found = grid.settings(made, gates)
    told = [(s.vector.name, s.alpha, s.at, s.operation, s.gate and s.gate.name) for s in found if s.vector is not None]
    expected = {
        (f"v{layer}", alpha, at, how, gate)
        for layer in (1, 3)
        for alpha, how in ((1.0, "add"), (2.0, "add"), (1.0, "project_out"))
        for at in ("all", "generated")
        for gate in (None, "g0", "g2")
        if (layer, gate) != (1, "g2")
    }
    assert len(told) == len(expected)
    assert set(told) == expected
    with pytest.raises(BadInputError, match="there is no gate"):
        grid.settings(made)
    for nothing in (Grid(alphas=()), Grid(gated=(True,))):
        with pytest.raises(BadInputError, match="make no setting"):
            nothing.settings(made[:1], gates[1:])
    with pytest.raises(BadInputError, match="0 vectors"):
        grid.settings([], gates)


def test_of_gates_of_one_name_the_nearest_is_taken() -> None:
    """The last one that judges before the vector acts, or where it does; of another name another."""

    def gate(layer: int, name: str) -> Gate:
        point = f"blocks.{layer}.hook_resid_post"
        return Gate(Above(torch.ones(4), 0.0, point, "mean", LAST_PROMPT), name)

    gates = [gate(1, "a"), gate(3, "a"), gate(2, "a"), gate(0, "b"), gate(4, "c")]
    vectors = [SteeringVector(torch.ones(4), f"blocks.{layer}.hook_resid_post", "coarse", "v") for layer in range(5)]
    found = {vector.layer: [one.condition.point for one in fitting_gates(vector, gates)] for vector in vectors}
    expected = {0: [0], 1: [1, 0], 2: [2, 0], 3: [3, 0], 4: [3, 0, 4]}
    assert found == {layer: [f"blocks.{n}.hook_resid_post" for n in own] for layer, own in expected.items()}
    settings = Grid((1.0, 2.0), gated=(False, True)).settings(vectors[2:3], gates)
    assert [(one.alpha, one.gate and one.gate.name) for one in settings] == [
        (1.0, None),
        (2.0, None),
        (1.0, "a"),
        (2.0, "a"),
        (1.0, "b"),
        (2.0, "b"),
    ]
