"""What a sweep of steering settings found: every setting's scores on both splits, and answers before and after.

A *setting* is a vector at a hook, an alpha, a rule of positions, an operation and perhaps a gate. Each has a row per
split on which it was evaluated; so have the controls, and the model without steering (kind `none`).

On disk, in one folder:

    sweep.json    all of it; what there is no number for is null
    settings.csv  the rows alone; what there is no number for is an empty cell

| column | is |
|---|---|
| `setting` | its number, the same on both splits |
| `split` | `validation`, on which settings are chosen, or `test` |
| `vector`, `kind`, `control` | the vector's name, how it was made, and `random` or `shuffled` if it is a control |
| `hook`, `layer`, `alpha`, `at`, `operation`, `gate` | where, how much, at which positions, how, and when |
| `effect`, `damage` | shares; with `_low` and `_high`, their 95 % bootstrap interval |
| `n_effect`, `n_damage` | over how many samples |
| `front`, `chosen`, `goal_met` | on its split's Pareto front; picked on validation; as good as was asked for |
| `control_for` | of a control, the number of the setting it is one of; 0 of others |
| `best_of` | validation's best of this kind of vector, alone or with this gate |
| any other | a further score |
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from hooked_mm.errors import BadInputError, unknown
from hooked_mm.run_output import output_folder
from hooked_mm.store_format import write_json
from hooked_mm.tensor_folder import read_json

Row = dict[str, Any]

FORMAT = 1
SPLITS = ("validation", "test")
NEEDED = ("setting", "split", "vector", "kind", "control", "hook", "layer", "alpha", "at", "operation", "gate")
"""What tells rows apart, and every row must have; scores may be missing."""
SCORES = ("effect", "effect_low", "effect_high", "damage", "damage_low", "damage_high", "n_effect", "n_damage")
FLAGS = ("front", "chosen", "goal_met")
MARKS = ("control_for", "best_of")
"""Which setting a control is one of, 0 for none; of which kind of vector validation picked it as the best."""


@dataclass(frozen=True)
class SweepResult:
    """A sweep's settings and what each did.

    Attributes:
        task: What was asked for: `name` ("red -> blue"), `effect` and `damage` (a sentence each: which share of what),
            `goal` (`{"effect": 0.9, "damage": 0.02}`: at least, and at most). Anything else that JSON holds may join.
        facts: (name, value) pairs to show on top: model, data, counts, seeds.
        rows: One per setting and split, see above.
        examples: `sample`, `picture` (its index, or None), `prompt`, answers `before` and `after`, `reference`,
            `setting` (the number) and `about` (`source`, `same type` or `other`).

    Raises:
        BadInputError: If a row lacks what tells it apart, or its split is unknown.
    """

    task: dict[str, Any]
    facts: list[tuple[str, str]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            missing = [name for name in NEEDED if name not in row]
            if missing:
                raise BadInputError(f"row {number} of the sweep has no {', '.join(missing)}; give every row {NEEDED}")
            if row["split"] not in SPLITS:
                raise unknown("split", row["split"], SPLITS)

    @property
    def name(self) -> str:
        """What the task is called."""
        return str(self.task.get("name", "steering"))

    def splits(self) -> list[str]:
        """The splits on which anything was evaluated."""
        there = {row["split"] for row in self.rows}
        return [split for split in SPLITS if split in there]

    def of(self, split: str) -> list[Row]:
        """The rows of a split.

        Raises:
            BadInputError: If nothing was evaluated on it.
        """
        if split not in self.splits():
            raise unknown("split in this sweep", split, self.splits())
        return [row for row in self.rows if row["split"] == split]

    def goal(self, score: str) -> float:
        """What was asked for of `effect` (at least) or `damage` (at most); NaN if nothing was."""
        return number(self.task.get("goal") or {}, score)

    def save(self, folder: str | Path) -> Path:
        """Write `settings.csv` and `sweep.json` into a folder, which is made; the JSON last, both at one stroke each.

        Raises:
            BadInputError: If the folder can't be made.
        """
        out = output_folder(folder)
        write_rows(self.rows, out / "settings.csv")
        content = {"task": self.task, "facts": self.facts, "rows": self.rows, "examples": self.examples}
        write_json(out / "sweep.json", {"format": FORMAT, **plain(content)})
        return out

    @classmethod
    def load(cls, folder: str | Path) -> SweepResult:
        """What `save` wrote; scores without a number are None.

        Raises:
            BadInputError: If the folder holds no sweep, or one of another format.
        """
        content = read_json(folder, "sweep", "sweep", "run the sweep again")
        if content.get("format") != FORMAT:
            raise BadInputError(
                f"the sweep in {str(folder)!r} has format {content.get('format')}, this version reads {FORMAT}; "
                "run the sweep again"
            )
        try:
            facts = [(str(name), str(value)) for name, value in content["facts"]]
            return cls(content["task"], facts, content["rows"], content["examples"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadInputError(
                f"sweep.json in {str(folder)!r} is no sweep ({error!r}); run the sweep again"
            ) from error


def number(row: Mapping[str, Any], name: str) -> float:
    """A score of a row; NaN where there is none."""
    value = row.get(name)
    return math.nan if value is None else float(value)


def unsteered(row: Row) -> bool:
    """Whether the row is of the model as it is."""
    return row["kind"] == "none"


def steered(rows: Sequence[Row], control: bool = False) -> list[Row]:
    """The rows with a vector that is meant to work, or those with a control."""
    return [row for row in rows if not unsteered(row) and bool(row["control"]) == control]


def further_scores(rows: Sequence[Row]) -> list[str]:
    """Names of the scores beside effect and damage that some row has a number for; no bounds of intervals."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in (*NEEDED, *SCORES, *FLAGS, *MARKS)))
    bounds = {f"{name}_{end}" for name in names for end in ("low", "high")}
    return [name for name in names if name not in bounds and any(_is_number(row.get(name)) for row in rows)]


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return real and math.isfinite(float(value))


def plain(value: Any) -> Any:
    """The same as JSON has it: lists for tuples, Python's numbers for NumPy's, None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(name): plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(own) for own in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_rows(rows: Sequence[Row], path: str | Path) -> Path:
    """A CSV file at one stroke; columns in the order in which rows have them, empty cells where there is nothing."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    # Lines end as RFC 4180 has it: otherwise a carriage return within text would stand unquoted.
    writer = csv.DictWriter(text, columns, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(cast("list[Row]", plain(rows)))
    file = Path(path)
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_text(text.getvalue(), encoding="utf-8", newline="")
    os.replace(aside, file)
    return file
