"""Made-up sweeps whose numbers are known: steering that works best in the middle layer, and controls that do not."""

from __future__ import annotations

import math
from typing import Any

from steering.sweep_result import Row, SweepResult

LAYERS, ALPHAS, VECTORS = (1, 2, 3, 4), (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0), ("coarse", "fine 3→7")
GOAL = {"effect": 0.9, "damage": 0.02}


def row(setting: int, split: str, vector: str, layer: int | None, alpha: float, **own: Any) -> Row:
    """A row with all columns; scores NaN unless given."""
    nothing = dict.fromkeys(("effect", "effect_low", "effect_high", "damage", "damage_low", "damage_high"), math.nan)
    made: Row = {
        "setting": setting,
        "split": split,
        "vector": vector,
        "kind": "coarse",
        "control": "",
        "hook": "" if layer is None else f"blocks.{layer}.hook_resid_post",
        "layer": layer,
        "alpha": alpha,
        "at": "last",
        "operation": "add",
        "gate": "",
        **nothing,
        "n_effect": 412,
        "n_damage": 1000,
        "front": False,
        "chosen": False,
        "goal_met": False,
    }
    return made | own


def scored(effect: float, damage: float, **own: Any) -> dict[str, Any]:
    """Both scores with intervals of two and one percent to each side."""
    found = {"effect": effect, "effect_low": max(0.0, effect - 0.02), "effect_high": min(1.0, effect + 0.02)}
    found |= {"damage": damage, "damage_low": damage - 0.01, "damage_high": damage + 0.01}
    return found | {"goal_met": effect >= GOAL["effect"] and damage <= GOAL["damage"]} | own


def mark_front(rows: list[Row]) -> None:
    """Settings that no other beats in one score without being worse in the other, by the definition."""
    mine = [r for r in rows if not r["control"] and r["kind"] != "none"]
    for one in mine:
        one["front"] = not any(
            other["effect"] >= one["effect"]
            and other["damage"] <= one["damage"]
            and (other["effect"], other["damage"]) != (one["effect"], one["damage"])
            for other in mine
        )


def made_up(text: str = "red", *, controls: bool = True, damage: bool = True) -> SweepResult:
    """Four layers, eight alphas, two vectors and two controls on both splits."""
    rows: list[Row] = []
    for split, worse in (("validation", 0.0), ("test", 0.006)):
        here = [row(0, split, "", None, 0.0, kind="none", at="", operation="", **scored(0.004, 0.0, accuracy=0.941))]
        setting = 0
        for vector in VECTORS:
            for layer in LAYERS:
                for alpha in ALPHAS:
                    setting += 1
                    good = 1 / (1 + math.exp(-1.6 * (math.log2(alpha) - 1.2 - 0.7 * abs(layer - 2.2))))
                    lost = 0.7 / (1 + math.exp(-1.3 * (math.log2(alpha) - 6.6 + 0.25 * layer)))
                    lost *= 1.0 if vector == "coarse" else 0.55
                    own = scored(good - worse, lost + worse / 3, accuracy=0.941 - lost, same_type_changed=0.4 * good)
                    kind = "coarse" if vector == "coarse" else "fine"
                    here.append(row(setting, split, vector, layer, alpha, kind=kind, **own))
        for vector in VECTORS if controls else ():
            for control in ("random", "shuffled"):
                for layer in LAYERS:
                    for alpha in ALPHAS:
                        setting += 1
                        lost = 0.6 / (1 + math.exp(-1.3 * (math.log2(alpha) - 6.4 + 0.2 * layer)))
                        lost *= 1.0 if vector == "coarse" else 0.6
                        own = scored(0.01 + 0.02 * (control == "shuffled"), lost, accuracy=0.941 - lost)
                        name = f"{control} for {vector}, seed 0"
                        here.append(row(setting, split, name, layer, alpha, kind=control, control=control, **own))
        mark_front(here)
        rows += here
    best = max((r for r in rows if r["split"] == "validation" and r["goal_met"]), key=lambda r: r["effect"])
    for one in rows:
        one["chosen"] = one["setting"] == best["setting"]
        if not damage:
            one |= {"damage": math.nan, "damage_low": math.nan, "damage_high": math.nan}
            one |= {"front": False, "goal_met": False}
    examples = [
        {
            "sample": f"s{n}",
            "picture": n,
            "prompt": "What colour is the circle?",
            "before": f"{text}",
            "after": after,
            "reference": text,
            "setting": best["setting"],
            "about": about,
        }
        for n, (after, about) in enumerate(
            [("blue", "source"), ("blue", "source"), (text, "source"), ("green", "same type"), ("yes", "other")]
        )
    ]
    task = {
        "name": f"{text} -> blue",
        "effect": f"share of samples answered {text} that are answered blue",
        "damage": "points of accuracy lost on questions of other types",
        "goal": GOAL,
    }
    facts = [("model", "small LLaVA, 6 layers"), ("data", f"scenes: {text}"), ("seed", "0")]
    return SweepResult(task, facts, rows, examples)
