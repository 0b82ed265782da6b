"""Rows of scores: means with intervals, the goal, the front, and the choice against its words read by brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_mm.intervals import bootstrap
from hooked_mm.steering_vector import SteeringVector
from steering.scoring import all_scores, choose, on_front, rows_of
from steering.setting import Setting
from steering.steered_answers import Answers
from steering.tasks import AnswerTask, Goal

GOAL = Goal(0.9, 0.02)


def some(count: int) -> list[Setting]:
    """Settings with alphas 1, 2, 3, ..."""
    vector = SteeringVector([1.0, 2.0], "blocks.1.hook_resid_post", "coarse", "v")
    return [Setting(vector, float(alpha)) for alpha in range(1, count + 1)]


def scores_of(seed: int, settings_: int, samples: int) -> dict[str, Tensor]:
    """Made-up scores: of every third sample an effect, of the others a damage; the first row does and loses nothing."""
    drawn = torch.Generator().manual_seed(seed)
    values = torch.rand(2, settings_, samples, generator=drawn).round(decimals=1)
    values[:, 0] = 0
    asked = torch.arange(samples) % 3 == 0
    nothing = torch.tensor(torch.nan)
    effect, damage = values[0].round().where(asked, nothing), (values[1] - 0.5).where(~asked, nothing)
    damage[0] = torch.zeros(samples).where(~asked, nothing)
    return {"effect": effect, "damage": damage, "kl": values[1].where(~asked, nothing), "never": damage * torch.nan}


@given(seed=st.integers(0, 1000), count=st.integers(1, 6), samples=st.integers(4, 40))
def test_rows_hold_means_and_intervals(seed: int, count: int, samples: int) -> None:
    """Of the samples that count; the unsteered model has no effect and no damage, without any width."""
    scores = scores_of(seed, count + 1, samples)
    numbers = list(range(10, 10 + count))
    control_of = {numbers[-1]: ("random", numbers[0])} if count > 1 else {}
    rows = rows_of(some(count), numbers, scores, "test", GOAL, control_of, draws=200)
    assert [row["setting"] for row in rows] == [0, *numbers]
    assert [row["alpha"] for row in rows] == [0.0, *(float(n) for n in range(1, count + 1))]
    for place, row in enumerate(rows):
        for name in ("effect", "damage"):
            own = [value for value in scores[name][place].double().tolist() if not math.isnan(value)]
            assert row[name] == pytest.approx(sum(own) / len(own), abs=1e-9)
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
            assert min(own) - 1e-9 <= row[f"{name}_low"]
            assert row[f"{name}_high"] <= max(own) + 1e-9
            assert row[f"n_{name}"] == len(own)
            alone = bootstrap(scores[name][place], draws=200)
            assert row[f"{name}_low"] == pytest.approx(float(alone.low), abs=1e-9)
            assert row[f"{name}_high"] == pytest.approx(float(alone.high), abs=1e-9)
        assert row["kl"] == pytest.approx(float(scores["kl"][place].nanmean()))
        assert math.isnan(row["never"])
        assert row["split"] == "test"
        assert row["chosen"] is False
        assert row["goal_met"] == (row["effect"] >= 0.9 and row["damage"] <= 0.02)
        assert (row["control"], row["control_for"]) == control_of.get(row["setting"], ("", 0))
    zero = [rows[0][f"{name}{end}"] for name in ("effect", "damage") for end in ("", "_low", "_high")]
    assert zero == [0.0] * 6
    real = [row for row in rows if not row["control"]]
    for row in rows:
        beaten = any(
            other["effect"] >= row["effect"]
            and other["damage"] <= row["damage"]
            and (other["effect"] > row["effect"] or other["damage"] < row["damage"])
            for other in real
        )
        assert row["front"] == (not row["control"] and not beaten)
    assert on_front(rows) == {row["setting"] for row in rows if row["front"]}


def test_a_goal_that_is_just_met_is_met() -> None:
    """One of fifty is 2 %, and nine of ten 90 %, wherever it stands among the samples."""
    for place in (0, 49):
        damage, effect = torch.zeros(2, 60), torch.ones(2, 60)
        damage[1, place] = 1
        damage[:, 50:] = torch.nan
        effect[1, 50 if not place else 59] = 0
        effect[:, :50] = torch.nan
        (_, row) = rows_of(some(1), [1], {"effect": effect, "damage": damage}, "test", GOAL, draws=20)
        assert (row["effect"], row["damage"], row["goal_met"]) == (0.9, 0.02, True)


def test_side_effects_are_those_on_what_shall_stay() -> None:
    """Divergence and surprise of samples of other types alone; the answers' own scores beside."""
    samples: list[dict[str, Any]] = [
        {"question_type": kind, "answer": "no"} for kind in ("presence", "colour", "colour")
    ]
    kl = torch.tensor([[0.0, 0.0, 0.0], [9.0, 1.0, 3.0]])
    answers = Answers(samples, [["no", "no", "no"], ["yes", "no", "yes"]], kl, None)
    found = all_scores(AnswerTask(source="no", target="yes", types=["presence"]), answers)
    assert found["kl"][0].isnan().tolist() == [True, False, False]
    assert found["kl"][1, 1:].tolist() == [1, 3]
    assert "nll" not in found
    rows = rows_of(some(1), [1], found, "test", GOAL, draws=20)
    assert rows[1]["kl"] == 2
    assert (rows[1]["effect"], rows[1]["damage"]) == (1, 0.5)


def better(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the docstring of `choose` speaks for `one` and not for `other`, both steered."""

    def safe(row: dict[str, Any]) -> bool:
        return row["effect_low"] >= GOAL.effect and row["damage_high"] <= GOAL.damage

    for rule in (safe, lambda row: row["goal_met"]):
        if rule(one) != rule(other):
            return bool(rule(one))
    if not one["goal_met"] and not safe(one):
        lacks = []
        for row in (one, other):
            short = GOAL.effect - row["effect"] if row["effect"] < GOAL.effect else 0
            excess = row["damage"] - GOAL.damage if row["damage"] > GOAL.damage else 0
            lacks.append(short + excess)
        if lacks[0] != lacks[1]:
            return lacks[0] < lacks[1]
    damage = [round(1000 * max(row["damage"], 0)) for row in (one, other)]
    if damage[0] != damage[1]:
        return damage[0] < damage[1]
    effect = [round(1000 * row["effect"]) for row in (one, other)]
    if effect[0] != effect[1]:
        return effect[0] > effect[1]
    if abs(one["alpha"]) != abs(other["alpha"]):
        return abs(one["alpha"]) < abs(other["alpha"])
    return bool(one["setting"] < other["setting"])


@st.composite
def a_row(draw: st.DrawFn) -> dict[str, Any]:
    """A row as `rows_of` makes them."""
    effect = draw(st.sampled_from([0.0, 0.5, 0.89, 0.9, 0.95, 1.0, math.nan]))
    damage = draw(st.sampled_from([-0.03, 0.0, 0.01, 0.02, 0.021, 0.3, math.nan]))
    width = draw(st.sampled_from([0.0, 0.0, 0.01, 0.05]))
    return {
        "effect": effect,
        "effect_low": effect - width,
        "damage": damage,
        "damage_high": damage + width,
        "alpha": draw(st.sampled_from([-1.0, 0.5, 1.0, 2.0])),
        "control": draw(st.sampled_from(["", "", "", "random", "shuffled"])),
        "goal_met": effect >= GOAL.effect and damage <= GOAL.damage,
    }


@settings(max_examples=500)
@given(rows=st.lists(a_row(), max_size=6), order=st.randoms(use_true_random=False))
def test_the_choice_is_what_its_words_say(rows: list[dict[str, Any]], order: Any) -> None:
    """In whatever order rows stand: no control, nothing without a number, not the model as it is."""
    numbered = [{**row, "setting": number} for number, row in enumerate(rows)]
    known = [
        row
        for row in numbered
        if row["setting"] and not row["control"] and not math.isnan(row["effect"] + row["damage"])
    ]
    best = [row["setting"] for row in known if not any(better(other, row) for other in known)]
    order.shuffle(numbered)
    assert choose(numbered, GOAL) == (best[0] if best else 0)
    assert len(best) <= 1


def test_the_choice_by_hand() -> None:
    """A goal that is surely met, then one that is met, then what comes nearest; a perfect control is none."""
    nothing = {"setting": 0, "effect": 0.0, "effect_low": 0.0, "damage": 0.0, "damage_high": 0.0, "control": ""}
    nothing |= {"alpha": 0.0, "goal_met": False}

    def row(number: int, effect: float, damage: float, width: float, **own: Any) -> dict[str, Any]:
        met = effect >= 0.9 and damage <= 0.02
        ends = {"effect_low": effect - width, "damage_high": damage + width, "goal_met": met, "alpha": 1.0}
        return {"setting": number, "effect": effect, "damage": damage, "control": "", **ends, **own}

    surely, barely = row(1, 0.95, 0.015, 0.001), row(2, 0.9, 0.0, 0.05)
    near, far = row(3, 0.89, 0.02, 0.0), row(4, 1.0, 0.5, 0.0)
    control = row(5, 1.0, 0.0, 0.0, control="random")
    for given_, expected in (
        ([nothing, surely, barely, near, far, control], 1),
        ([nothing, barely, near, far, control], 2),
        ([nothing, near, far, control], 3),
        ([nothing, far, control], 4),
        ([nothing, control], 0),
        ([nothing], 0),
        ([], 0),
    ):
        assert choose(given_, GOAL) == expected
    assert choose([nothing, row(1, 0.95, 0.0, 0.0, alpha=-3.0), row(2, 0.95, -0.01, 0.0, alpha=2.0)], GOAL) == 2
