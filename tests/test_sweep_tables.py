"""Tables of a sweep: the whole front, numbers counted by hand, and what stands there where there is no number."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hooked_mm.errors import BadInputError
from steering.sweep_result import Row, SweepResult
from steering.sweep_tables import (
    controls_for,
    controls_of,
    front_rows,
    front_table,
    meaning,
    percent,
    settings_table,
    verdicts,
    where_name,
    write_csv,
)
from tests.sweeps import GOAL, made_up, row, scored


def _small() -> list[Row]:
    """Three settings, the second dominated, the third chosen; a control of each kind at the third; the model."""
    here: list[Row] = []
    for split in ("validation", "test"):
        here += [
            row(0, split, "", None, 0.0, kind="none", at="", operation="", **scored(0.01, 0.0)),
            row(3, split, "a", 2, 4.0, chosen=True, front=True, **scored(0.95, 0.005)),
            row(2, split, "a", 2, 2.0, **scored(0.3, 0.007)),
            row(1, split, "a", 2, 1.0, front=True, **scored(0.25, -0.0001)),
            row(4, split, "random for a, seed 0", 2, 4.0, kind="random", control="random", **scored(0.02, 0.004)),
            row(5, split, "shuffled for a, seed 0", 2, 4.0, kind="shuffled", control="shuffled", **scored(0.03, 0.1)),
            row(6, split, "random for a, seed 0", 2, 2.0, kind="random", control="random", **scored(0.01, 0.0)),
        ]
    return here


@pytest.fixture
def small() -> SweepResult:
    return SweepResult({"name": "a to b", "effect": "share", "goal": GOAL}, [("model", "m")], _small())


def test_the_front_in_order(small: SweepResult) -> None:
    """Least damage first; no dominated setting; controls only where the chosen setting is; the model last."""
    found = [(row["role"], row["setting"]) for row in front_rows(small, "test")]
    assert found == [("front", 1), ("chosen", 3), ("control", 4), ("control", 5), ("unsteered", 0)]


def test_a_chosen_setting_off_the_front_stays() -> None:
    """Picked on validation, beaten on test: it stands there all the same, where only validation has the mark too."""
    rows = _small()
    for one in rows:
        one["chosen"] = one["setting"] == 2 and one["split"] == "validation"
    found = [(row["role"], row["setting"]) for row in front_rows(SweepResult({}, [], rows), "test")]
    assert found == [("front", 1), ("front", 3), ("chosen", 2), ("control", 6), ("unsteered", 0)]


def test_numbers_of_the_table(small: SweepResult) -> None:
    """Percent with intervals; what rounds to zero has no sign; columns lie under each other."""
    lines = front_table(small).splitlines()
    assert lines[0] == "a to b, test: Pareto front (at last, operation add, no gate)"
    assert lines[1] == "effect: share; n = 412; goal: at least 90 %"
    head = next(line for line in lines if line.startswith("role"))
    table = lines[lines.index(head) + 1 :][:5]
    cells = [" ".join(line.split()) for line in table]
    assert cells[0] == "front 1 a coarse 2 1 25.0 [23.0, 27.0] 0.0 [-1.0, 1.0] not met"
    assert cells[1] == "chosen 3 a coarse 2 4 95.0 [93.0, 97.0] 0.5 [-0.5, 1.5] met"
    assert cells[4] == "unsteered 0 – none – – 1.0 [0.0, 3.0] 0.0 [-1.0, 1.0] not met"
    assert {line.index("coarse") for line in table[:2]} == {head.index("kind")}
    end = head.index("effect %") + len("effect %")
    assert [line[:end].split()[-1] for line in table] == ["25.0", "95.0", "2.0", "3.0", "1.0"]


def test_verdict(small: SweepResult) -> None:
    """The chosen setting's numbers on test, the goal, and the controls of the same place."""
    (text,) = verdicts(small)
    assert text == (
        "Setting 3 (chosen on validation): a (coarse) at blocks.2.hook_resid_post, alpha 4, at last, operation add. "
        "On test: effect 95.0 % [93.0, 97.0], damage 0.5 % [-0.5, 1.5]; the goal (effect ≥ 90 %, damage ≤ 2 %) is "
        "met. Controls there: random effect 2.0 % [0.0, 4.0], damage 0.4 % [-0.6, 1.4]; shuffled effect 3.0 % "
        "[1.0, 5.0], damage 10.0 % [9.0, 11.0]."
    )
    assert text in front_table(small)
    for one in small.rows:
        one |= {"effect_low": 0.89} if one["setting"] == 3 else {}
    assert "is met, though an interval reaches past it" in verdicts(small)[0]


def test_verdicts_without_much() -> None:
    """No settings, none chosen, chosen but not tested, no controls, no goal: each is said."""
    assert verdicts(SweepResult({})) == ["The sweep has no settings."]
    rows = _small()
    tested = [one for one in rows if not (one["split"] == "test" and one["setting"] == 3)]
    assert verdicts(SweepResult({}, [], tested)) == ["The chosen setting was not evaluated on test."]
    alone = [one for one in rows if not one["control"]]
    (text,) = verdicts(SweepResult({}, [], alone))
    assert text.endswith("damage 0.5 % [-0.5, 1.5]. No control ran there.")
    assert "goal" not in text
    unchosen = [one | {"chosen": False} for one in rows]
    (text,) = verdicts(SweepResult({}, [], unchosen))
    assert text.startswith("Nothing was chosen")
    # Controls stand there all the same, at all settings.
    every = [one["setting"] for one in unchosen if one["control"] and one["split"] == "test"]
    for few, controls in ((alone, []), (unchosen, every)):
        result = SweepResult({}, [], few)
        assert [row["setting"] for row in front_rows(result, "test") if row["role"] == "control"] == controls
        assert "goal" not in front_table(result)


def test_no_damage_at_all() -> None:
    """All settings, the largest effect first; dashes for damage."""
    result = made_up(damage=False)
    rows = front_rows(result, "test")
    effects = [row["effect"] for row in rows if row["role"] in ("", "chosen")]
    assert len(effects) == 64
    assert effects == sorted(effects, reverse=True)
    text = front_table(result)
    assert "no damage was measured: all settings by effect" in text
    assert "damage not measured" in text
    assert "nan" not in text.lower()


def test_no_number_at_all() -> None:
    """Rows of dashes, in the order in which they came."""
    rows = [row(n, "test", "v", 2, float(n), chosen=n == 2) for n in (1, 2)]
    found = front_table(SweepResult({}, [], rows))
    cells = [line.split() for line in found.splitlines() if line.startswith((" ", "chosen"))]
    assert cells == [["1", "v", "coarse", "2", "1", "–", "–"], ["chosen", "2", "v", "coarse", "2", "2", "–", "–"]]
    assert "nan" not in found.lower()
    assert percent(rows[0], "effect") == "–"


def test_one_setting_only() -> None:
    """Neither controls, nor the model, nor a second split."""
    one = row(7, "validation", "v", 2, 1.0, front=True, **scored(0.5, 0.1))
    result = SweepResult({"name": "x"}, [], [one])
    assert [(r["role"], r["setting"]) for r in front_rows(result, "validation")] == [("front", 7)]
    assert "50.0  [48.0, 52.0]" in front_table(result, "validation")
    with pytest.raises(BadInputError, match="no split in this sweep 'test'"):
        front_table(result)


def test_details_stand_in_columns_where_they_differ(small: SweepResult) -> None:
    """Said once if the same everywhere, whatever the unsteered model has."""
    rows = [one for one in small.of("test") if not one["control"]]
    assert settings_table(small, rows).head[:5] == ["setting", "vector", "kind", "layer", "alpha"]
    rows[1] = rows[1] | {"at": "generated", "gate": "concept 3 > 0.5"}
    table = settings_table(small, rows)
    assert table.head[4:7] == ["at", "gate", "alpha"]
    assert [line[4:6] for line in table.lines[:3]] == [["", ""], ["generated", "concept 3 > 0.5"], ["last", ""]]
    assert table.same == "operation add"


def test_further_scores_stand_there(small: SweepResult) -> None:
    """In a table of their own in plain text, with intervals where they have them."""
    rows = [one | {"kl": 0.12345, "kl_low": 0.1, "kl_high": 0.15} for one in small.rows]
    text = front_table(replace(small, rows=rows))
    assert text.count("0.1235 [0.1, 0.15]") == 5
    assert text.index("further scores") > text.index("effect %")
    assert "further scores" not in front_table(small)


def test_where() -> None:
    """The layer, or the hook where that alone tells places apart."""
    one, two = row(1, "test", "v", 2, 1.0), row(2, "test", "v", 3, 1.0)
    nowhere = row(3, "test", "v", None, 1.0, hook="projector.hook_out")
    mlp = row(4, "test", "v", 3, 1.0, hook="blocks.3.hook_mlp_out")
    name = where_name([one, two, nowhere])
    assert [name(each) for each in (one, two, nowhere)] == ["layer 2", "layer 3", "projector.hook_out"]
    name = where_name([one, two, mlp])
    assert [name(each) for each in (one, mlp)] == ["blocks.2.hook_resid_post", "blocks.3.hook_mlp_out"]


def test_whose_control() -> None:
    """By the longest vector's name in its own; those that name none are everybody's; the same place and split."""
    mine = [row(n, "test", name, 2, 1.0) for n, name in enumerate(("1 -> 3", "11 -> 3"))]
    names = ("random for 1 -> 3, seed 0", "random for 11 -> 3, seed 0", "anything")
    rows = [*mine, *(row(n, "test", name, 2, 1.0, control="random") for n, name in enumerate(names, start=2))]
    assert [one["setting"] for one in controls_for("1 -> 3", rows)] == [2, 4]
    assert [one["setting"] for one in controls_for("11 -> 3", rows)] == [3, 4]
    for change in ({"alpha": 2.0}, {"layer": 3, "hook": "b"}, {"gate": "g"}, {"split": "validation"}):
        assert controls_of(mine[0] | change, rows) == []


def test_counts_and_goals_are_said(small: SweepResult) -> None:
    """A range where counts differ; damage without a sentence still has its goal."""
    rows = [
        small.rows[0] | {"n_effect": 10, "n_damage": None},
        small.rows[1] | {"n_effect": 1200, "n_damage": math.nan},
    ]
    assert meaning(small, rows) == [
        ("effect", "share; n = 10 to 1,200; goal: at least 90 %"),
        ("damage", "goal: at most 2 %"),
    ]
    assert meaning(SweepResult({}), []) == []


def test_csv(small: SweepResult, tmp_path: Path) -> None:
    """All rows, and those of the fronts of both splits with their roles; numbers to the last digit."""
    write_csv(small, tmp_path)
    settings, front = (list(csv.DictReader((tmp_path / f"{n}.csv").open(newline=""))) for n in ("settings", "front"))
    assert [(one["split"], int(one["setting"])) for one in settings] == [(r["split"], r["setting"]) for r in small.rows]
    assert [one["role"] for one in front] == ["front", "chosen", "control", "control", "unsteered"] * 2
    assert float(front[0]["damage"]) == -0.0001


def test_an_evaluation_shows_every_setting_with_its_own_controls() -> None:
    """Nothing is chosen there: a setting that does nothing but damage stands in the table all the same, and of controls
    at one place each is the one's that it was made for, whatever the vectors are called."""
    mine = [
        row(n, "test", "a -> b", 3, 1.0, kind=kind, **scored(0.0, 0.3)) for n, kind in ((1, "coarse"), (2, "probe"))
    ]
    controls = [
        row(n, "test", f"random for a -> b, seed {n}", 3, 1.0, kind="random", control="random", **scored(0.0, 0.1))
        | {"control_for": owner}
        for n, owner in ((3, 1), (4, 2))
    ]
    bare = row(0, "test", "", None, 0.0, kind="none", **scored(0.0, 0.0, front=True))
    result = SweepResult({"name": "a → b"}, [], [bare, *mine, *controls])
    assert [one["setting"] for one in front_rows(result, "test")] == [1, 2, 3, 4, 0]
    for one, control in zip(mine, controls, strict=True):
        assert controls_of(one, result.rows) == [control]
    printed = front_table(result, "test")
    assert "all settings, the least damage first" in printed
    assert "no damage was measured" not in printed
