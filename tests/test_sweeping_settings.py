"""What a sweep tries: grids, gates that fit, controls, and the best of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from hooked_mm.conditions import Above
from hooked_mm.errors import BadInputError
from hooked_mm.positions import LAST_PROMPT
from hooked_mm.steering_vector import SteeringVector
from steering.gate import Gate
from steering.setting import Setting
from steering.sweeping import Grid, best_of_kinds, controls_for, fitting_gates
from steering.tasks import Goal


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


def test_controls_keep_everything_but_the_direction() -> None:
    """The gate, the place, the operation; of what acts together every vector is another, each as long as its own."""
    gate = Gate(Above(torch.ones(8), 0.0, hook(0), "mean", LAST_PROMPT), "g")
    v, w = (SteeringVector(torch.arange(1.0, 9) * n, hook(n), "coarse", f"v{n}") for n in (1, 2))
    alone = controls_for(Setting(v, 2.0, "all", "set", gate), [1.0, 2.0], [replace(w, kind="shuffled")], seeds=3)
    assert [(s.alpha, kind) for s, kind in alone] == [
        *((2.0, kind) for kind in ("random", "random", "random", "shuffled")),
        (1.0, "random"),
        (1.0, "shuffled"),
    ]
    assert all((s.at, s.operation, s.gate) == ("all", "set", gate) for s, _ in alone)
    for chosen in (Setting(v, 2.0, also=(Setting(w, 3.0),)), Setting(also=(Setting(v, 2.0), Setting(w, 3.0)))):
        for setting, kind in controls_for(chosen, [], [replace(w, kind="shuffled")]):
            assert kind == "random"
            assert [part.alpha for part in setting.parts] == [2.0, 3.0]
            for part, own in zip(setting.parts, (v, w), strict=True):
                assert part.vector is not None
                assert part.vector.kind == "random"
                assert part.vector.hook == own.hook
                assert part.vector.norm == pytest.approx(own.norm)
    assert [s.alpha for s, _ in controls_for(Setting(v, operation="project_out"), [1.0, 2.0])] == [1.0, 1.0]
    assert controls_for(Setting(), [1.0]) == []


def test_the_best_of_each_kind_is_chosen_among_its_own() -> None:
    """Controls and the model as it is are none of a kind."""

    def row(number: int, kind: str, effect: float, gate: str = "", control: str = "") -> dict[str, Any]:
        ends = {"effect_low": effect, "damage": 0.0, "damage_high": 0.0, "alpha": 1.0, "goal_met": effect >= 0.9}
        return {"setting": number, "kind": kind, "gate": gate, "control": control, "effect": effect, **ends}

    rows: Sequence[dict[str, Any]] = [
        row(0, "none", 0.0),
        row(1, "coarse", 0.5),
        row(2, "coarse", 0.7),
        row(3, "coarse", 0.6, "warm"),
        row(4, "fine", 1.0),
        row(5, "random", 1.0, control="random"),
        row(6, "probe", float("nan")),
    ]
    assert best_of_kinds(rows, Goal(0.9, 0.02)) == {2: "coarse", 3: "coarse, warm", 4: "fine"}


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
