"""What a sweep tries: grids, gates that fit, controls, and the best of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from hooked_mm.conditions import Above
from hooked_mm.positions import LAST_PROMPT
from hooked_mm.steering_vector import SteeringVector
from steering.gate import Gate
from steering.setting import Setting
from steering.sweeping import best_of_kinds, controls_for
from steering.tasks import Goal


def hook(layer: int) -> str:
    """Behind a block."""
    return f"blocks.{layer}.hook_resid_post"


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
