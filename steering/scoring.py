"""From answers to a row per setting: mean scores with bootstrap intervals, the goal, the Pareto front, the choice.

Intervals resample samples, the same for every setting, so that settings can be compared with each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import torch

from hooked_mm.intervals import bootstrap
from steering.pareto import front
from steering.setting import Setting
from steering.steered_answers import Answers
from steering.tasks import Goal, Scores, Task

LIMITED = ("effect", "damage")
"""The scores that get intervals."""

Row = dict[str, Any]


def all_scores(task: Task, answers: Answers) -> Scores:
    """Those of the task, and where they were measured, side effects: `kl` and `nll` on the samples that shall stay as
    they are, `nll_source` on those that shall not; a mean `nll` is the logarithm of a perplexity."""
    scores = task.scores(answers)
    about = task.about(answers)
    other, source = (torch.tensor([one == what for one in about]) for what in ("other", "source"))
    if answers.kl is not None:
        scores["kl"] = torch.where(other, answers.kl, torch.nan)
    if answers.nll is not None:
        scores["nll"] = torch.where(other, answers.nll, torch.nan)
        scores["nll_source"] = torch.where(source, answers.nll, torch.nan)
    return scores


def rows_of(
    settings: Sequence[Setting],
    numbers: Sequence[int],
    scores: Scores,
    split: str,
    goal: Goal,
    control_of: Mapping[int, tuple[str, int]] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> list[Row]:
    """A row per setting, the unsteered model first, as `sweep_result` describes them.

    Args:
        settings: Without the unsteered one.
        numbers: Of the settings in the sweep, from 1; the unsteered model is 0.
        scores: (1 + settings, samples) each.
        split: What the samples are called.
        goal: Of the task.
        control_of: Number of a setting -> which control it is, and of which setting; others are none.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    limits = {name: bootstrap(scores[name].T, draws=draws, seed=seed) for name in LIMITED}
    rows: list[Row] = []
    for place, (number, setting) in enumerate(zip([0, *numbers], [Setting(), *settings], strict=True)):
        kind, owner = (control_of or {}).get(number, ("", 0))
        row: Row = {
            "setting": number,
            "split": split,
            **setting.describe(),
            "control": kind,
            "control_for": owner,
        }
        for name, found in limits.items():
            row |= {
                # Of 0.02 there may be 0.020000000000000018, which is no more than 0.02.
                key: round(float(one[place]), 12)
                for key, one in zip((name, f"{name}_low", f"{name}_high"), found, strict=True)
            }
            row[f"n_{name}"] = int((~scores[name][place].isnan()).sum())
        row |= {name: _mean(one[place]) for name, one in scores.items() if name not in LIMITED}
        row["goal_met"] = row["effect"] >= goal.effect and row["damage"] <= goal.damage
        row["chosen"] = False
        rows.append(row)
    on = on_front(rows)
    return [{**row, "front": row["setting"] in on} for row in rows]


def _mean(values: torch.Tensor) -> float:
    return float(values.nanmean()) if bool((~values.isnan()).any()) else float("nan")


def on_front(rows: Sequence[Row]) -> set[int]:
    """Numbers of the settings, controls apart, that no other beats in effect and damage both."""
    real = [row for row in rows if not row["control"]]
    effect, damage = (torch.tensor([row[name] for row in real]) for name in LIMITED)
    return {row["setting"] for row, one in zip(real, front(effect, damage).tolist(), strict=True) if one}


def choose(rows: Sequence[Row], goal: Goal) -> int:
    """The setting that validation speaks for.

    Of those that reach the goal on both ends of their intervals, or else at all, the one of least damage, then of most
    effect, then of least alpha (which leaves most of the model alone), then of least number; where none reaches it, the
    one that lacks least, shortfalls of effect and excesses of damage added up. Damage and effect are compared in
    thousandths, and damage below 0 is none.

    Returns:
        Its number; 0, the unsteered model, if there is nothing else.
    """
    known = [row for row in rows if not any(isnan(row[name]) for name in LIMITED)]
    steered = [row for row in known if row["setting"] and not row["control"]]
    safe = [r for r in steered if r["effect_low"] >= goal.effect and r["damage_high"] <= goal.damage]
    met = safe or [row for row in steered if row["goal_met"]]

    def lacks(row: Row) -> float:
        return max(0.0, goal.effect - row["effect"]) + max(0.0, row["damage"] - goal.damage)

    def order(row: Row) -> tuple[float, ...]:
        damage = max(0.0, row["damage"])
        return (round(damage, 3), -round(row["effect"], 3), abs(row["alpha"]), row["setting"])

    best = min(met, key=order) if met else min(steered, key=lambda row: (lacks(row), *order(row)), default=None)
    return 0 if best is None else int(best["setting"])
