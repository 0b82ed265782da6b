"""A sweep as tables: the whole Pareto front, the chosen setting, controls, the unsteered model; what it comes to.

The front stands there whether or not the goal is met. Where damage was not measured there is no front: then all
settings stand there, the largest effect first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from hooked_mm.run_output import output_folder, text_columns
from steering.sweep_result import Row, SweepResult, further_scores, number, steered, unsteered, write_rows

SAME_PLACE = ("hook", "layer", "alpha", "at", "operation", "gate")
"""What a control shares with the setting that it is a control for."""
DETAILS = ("at", "operation", "gate")
"""Columns that are said once if they are the same everywhere."""


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        head: Names of the columns.
        lines: Cells; a line per row.
        roles: Per line what the row is: `chosen`, `front`, `control`, `unsteered`, or nothing.
        left: How many columns, from the left, hold text; the others hold numbers.
        same: What holds for all lines: "at last, add".
    """

    head: list[str]
    lines: list[list[str]]
    roles: list[str]
    left: int
    same: str


def chosen_settings(result: SweepResult) -> set[int]:
    """Numbers of the settings that were picked on validation."""
    return {row["setting"] for row in steered(result.rows) if row.get("chosen")}


def controls_for(vector: str, rows: Sequence[Row]) -> list[Row]:
    """A vector's controls: those that say so, or else those whose names hold its name, or no vector's.

    Of several names that a control's name holds the longest counts: `random for 11 -> 3` is no control for `1 -> 3`.
    """
    vectors = {row["setting"]: row["vector"] for row in steered(rows)}
    names = sorted(map(str, vectors.values()), key=len, reverse=True)

    def owner(row: Row) -> str:
        if row.get("control_for"):
            return str(vectors.get(row["control_for"], ""))
        return next((name for name in names if name in str(row["vector"])), vector)

    return [row for row in steered(rows, control=True) if owner(row) == vector]


def controls_of(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The setting's controls at the same hook, alpha, positions, operation and gate, on the same split."""
    shared = [row[name] for name in (*SAME_PLACE, "split")]
    found = [o for o in controls_for(row["vector"], rows) if [o[name] for name in (*SAME_PLACE, "split")] == shared]
    return [o for o in found if (o.get("control_for") or row["setting"]) == row["setting"]]


def shown_split(result: SweepResult) -> str:
    """`test` where anything was evaluated on it, else `validation`."""
    return result.splits()[-1] if result.rows else "test"


def front_rows(result: SweepResult, split: str) -> list[Row]:
    """The rows that `front_table` shows, in its order, each with its `role` as its first column.

    First the front, the least damage first, and the chosen settings among them; where nothing was chosen, all settings;
    then the controls at the chosen settings, or at all; then the unsteered model. Without any number for damage: all
    settings, the largest effect first.

    Raises:
        BadInputError: If nothing was evaluated on the split.
    """
    rows, chosen = result.of(split), chosen_settings(result)
    mine = steered(rows)
    if any(math.isfinite(number(row, "damage")) for row in mine):
        kept = [row for row in mine if row.get("front") or row["setting"] in chosen or not chosen]
        kept.sort(key=lambda row: (_last(number(row, "damage")), _last(-number(row, "effect"))))
    else:
        kept = sorted(mine, key=lambda row: _last(-number(row, "effect")))
    controls: list[Row] = []
    picked = [row for row in kept if row["setting"] in chosen]
    for row in picked or kept:
        controls += [other for other in controls_of(row, rows) if other not in controls]
    bare = [row for row in rows if unsteered(row)]
    return [{"role": role_of(row, chosen)} | row for row in (*kept, *controls, *bare)]


def _last(value: float) -> float:
    """A key to sort by, with which NaN comes last."""
    return math.inf if math.isnan(value) else value


def role_of(row: Row, chosen: Collection[int]) -> str:
    """What the row is, see `Table`; `chosen` are the numbers of the chosen settings."""
    if unsteered(row):
        return "unsteered"
    if row["control"]:
        return "control"
    return "chosen" if row["setting"] in chosen else "front" if row.get("front") else ""


def percent(row: Row, score: str) -> str:
    """A share and its 95 % interval, in percent: `93.1 % [90.2, 95.0]`; a dash where there is no number."""
    share, interval = _percent(number(row, score)), _interval(row, score)
    return f"{share} % {interval}".rstrip() if share != "–" else share


def _percent(value: float) -> str:
    # z: what rounds to 0 has no sign of its own.
    return f"{100 * value:z.1f}" if math.isfinite(value) else "–"


def _interval(row: Row, score: str) -> str:
    low, high = (number(row, f"{score}_{end}") for end in ("low", "high"))
    return f"[{_percent(low)}, {_percent(high)}]" if math.isfinite(low) and math.isfinite(high) else ""


def where_name(rows: Sequence[Row], before: str = "layer ") -> Callable[[Row], str]:
    """What to call where a row is steered: `layer 3`, or its hook where it has no layer or a layer has several hooks.

    Args:
        rows: Among which the name must tell places apart.
        before: The number of a layer.
    """
    hooks = {(row["hook"], row["layer"]) for row in rows if row["layer"] is not None}
    several = len(hooks) > len({layer for _, layer in hooks})
    return lambda row: _line(row["hook"] or "–") if row["layer"] is None or several else f"{before}{row['layer']}"


def score_text(row: Row, score: str) -> str:
    """A further score, with its interval where it has one."""
    value, low, high = (number(row, name) for name in (score, f"{score}_low", f"{score}_high"))
    if not math.isfinite(value):
        return "–"
    return f"{value:.4g}" + (f" [{low:.4g}, {high:.4g}]" if math.isfinite(low) and math.isfinite(high) else "")


def settings_table(result: SweepResult, rows: Sequence[Row], further: bool = True) -> Table:
    """Rows as text: setting, what and where, effect and damage in percent with intervals, whether the goal is met.

    Args:
        result: The sweep; without a goal there is no column for it.
        rows: Of it; their `role`, where they have one, is shown.
        further: Whether the other scores stand there too.
    """
    with_vector = [row for row in rows if not unsteered(row)]
    same = {name for name in DETAILS if len({row[name] for row in with_vector}) <= 1}
    details = [name for name in DETAILS if name not in same]
    roles = [str(row.get("role", "")) for row in rows]
    shown = further_scores(rows) if further else []
    asked = any(math.isfinite(result.goal(score)) for score in ("effect", "damage"))
    where = where_name(with_vector, "")
    names = ["role"] * any(roles) + ["setting", "vector", "kind", "layer", *details]
    head = [*names, "alpha", "effect %", "95 %", "damage %", "95 %", *["goal"] * asked, *shown]
    lines = []
    for row, role in zip(rows, roles, strict=True):
        bare = unsteered(row)
        kind = row["kind"] if row["control"] in ("", row["kind"]) else f"{row['kind']}, {row['control']}"
        own = [
            str(row["setting"]),
            "–" if bare else _line(row["vector"]),
            _line(kind),
            "–" if bare else where(row),
            *("" if bare else _line(row[name]) for name in details),
            "–" if bare else f"{float(row['alpha']):g}",
        ]
        for score in ("effect", "damage"):
            own += [_percent(number(row, score)), _interval(row, score)]
        own += ["met" if row.get("goal_met") else "not met"] * asked
        own += [score_text(row, name) for name in shown]
        lines.append([role] * any(roles) + own)
    told = [_detail(name, str(with_vector[0][name])) for name in DETAILS if name in same and with_vector]
    return Table(head, lines, roles, len(names), ", ".join(text for text in told if text))


def _detail(name: str, value: str) -> str:
    if name == "gate" and not value:
        return "no gate"
    return f"{name} {_line(value)}" if value else ""


def _line(text: object) -> str:
    return " ".join(str(text).split())


def meaning(result: SweepResult, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What effect and damage are here, over how many samples, and what was asked of them."""
    found = []
    for score, side in (("effect", "at least"), ("damage", "at most")):
        text = str(result.task.get(score, ""))
        counts = sorted({int(n) for row in rows if math.isfinite(n := number(row, f"n_{score}"))})
        goal = result.goal(score)
        notes = [f"n = {counts[0]:,}" if len(counts) == 1 else f"n = {counts[0]:,} to {counts[-1]:,}"] if counts else []
        notes += [f"goal: {side} {100 * goal:g} %"] if math.isfinite(goal) else []
        if text or notes:
            found.append((score, "; ".join(part for part in (text, *notes) if part)))
    return found


def verdicts(result: SweepResult) -> list[str]:
    """A sentence or two per chosen setting: what it does, whether that meets the goal, and what controls do there."""
    if not result.rows:
        return ["The sweep has no settings."]
    split = shown_split(result)
    rows, chosen = result.of(split), chosen_settings(result)
    found = [row for row in steered(rows) if row["setting"] in chosen]
    if not chosen:
        return ["Nothing was chosen here: the table has all settings that were evaluated."]
    if not found:
        return [f"The chosen setting was not evaluated on {split}."]
    return [_verdict(result, row, controls_of(row, rows)) for row in found]


def _verdict(result: SweepResult, row: Row, controls: Sequence[Row]) -> str:
    details = ", ".join(text for name in DETAILS if row[name] and (text := _detail(name, str(row[name]))))
    where = row["hook"] or f"layer {row['layer']}"
    picked = f"Setting {row['setting']} (chosen on validation): {_line(row['vector'])} ({row['kind']}) at {where}"
    scores = [f"{score} {_said(row, score)}" for score in ("effect", "damage")]
    text = f"{picked}, alpha {float(row['alpha']):g}, {details}. On {row['split']}: {', '.join(scores)}"
    asked = [
        f"{score} {sign} {100 * goal:g} %"
        for score, sign in (("effect", "≥"), ("damage", "≤"))
        if math.isfinite(goal := result.goal(score))
    ]
    if asked:
        past = number(row, "effect_low") < result.goal("effect") or number(row, "damage_high") > result.goal("damage")
        unsure = ", though an interval reaches past it" if row.get("goal_met") and past else ""
        text += f"; the goal ({', '.join(asked)}) is {'met' if row.get('goal_met') else 'not met'}{unsure}"
    if not controls:
        return f"{text}. No control ran there."
    told = (f"{o['control']} effect {_said(o, 'effect')}, damage {_said(o, 'damage')}" for o in controls)
    return f"{text}. Controls there: {'; '.join(told)}."


def _said(row: Row, score: str) -> str:
    return percent(row, score) if math.isfinite(number(row, score)) else "not measured"


def front_table(result: SweepResult, split: str = "test") -> str:
    """Plain text: what is measured, the rows of `front_rows`, the further scores, and the verdict.

    Args:
        result: The sweep.
        split: `validation` or `test`.

    Raises:
        BadInputError: If nothing was evaluated on the split.
    """
    rows = front_rows(result, split)
    table = settings_table(result, rows, further=False)
    measured = any(math.isfinite(number(row, "damage")) for row in result.of(split))
    everything = "all settings, the least damage first"
    what = (
        ("Pareto front" if chosen_settings(result) else everything)
        if measured
        else "no damage was measured: all settings by effect"
    )
    lines = [f"{result.name}, {split}: {what}" + (f" ({table.same})" if table.same else "")]
    lines += [f"{name}: {text}" for name, text in meaning(result, rows)]
    lines += ["", *text_columns([table.head, *table.lines], table.left)]
    shown = further_scores(rows)
    if shown:
        head = [*table.head[: table.left], "alpha", *shown]
        cells = [
            [*line[: table.left + 1], *(score_text(row, name) for name in shown)]
            for line, row in zip(table.lines, rows, strict=True)
        ]
        lines += ["", "further scores", *text_columns([head, *cells], table.left)]
    return "\n".join([*lines, "", *verdicts(result)]) + "\n"


def write_csv(result: SweepResult, folder: str | Path) -> Path:
    """`settings.csv`, all rows, and `front.csv`, those of `front_rows` of every split, into a folder, which is made."""
    out = output_folder(folder)
    write_rows(result.rows, out / "settings.csv")
    write_rows([row for split in result.splits() for row in front_rows(result, split)], out / "front.csv")
    return out
