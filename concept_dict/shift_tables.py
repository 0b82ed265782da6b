"""What a study of shifts found, as tables: per concept, per form, per comparison; CSV, JSON and plain text.

| file | one row per |
|---|---|
| `concepts.csv` | concept of the original |
| `forms.csv` | form (see `recovery.FORMS`): means over the concepts with enough rows |
| `comparisons.csv` | score and control: what the shift gains over it |
| `shift.json` | all of it, with settings, correlations, fates, and what is empty |

What there is no number for is an empty cell in CSV and null in JSON. Infinite relative gains (see
`gains.relative_gain`) are `-inf` in CSV, and null in JSON, which has no such number.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from concept_dict.fates import FATES
from concept_dict.gains import compare, counted, gain, relative_gain, values
from concept_dict.recovery import CONTROLS, FORMS, SCORES
from concept_dict.run_table import method_settings
from concept_dict.shift_study import ShiftStudy
from hooked_mm.errors import BadInputError
from hooked_mm.run_output import output_folder, text_columns

Row = dict[str, Any]
Studies = ShiftStudy | Mapping[str, ShiftStudy]
"""One study, or several by name."""


def known_scores(study: ShiftStudy) -> list[str]:
    """The scores that were computed: words only where there was something to decode by."""
    return [score for score in SCORES if score in study.recovery.scores["unshifted"]]


def form_values(study: ShiftStudy, score: str, form: str) -> Float[np.ndarray, " k"]:
    """A form's score per concept; NaN throughout where it was not computed (of `refitted`, what needs a move)."""
    found = study.recovery.scores.get(form, {})
    return values(study.recovery, score, form) if score in found else np.full(study.k, np.nan)


def mean(found: Float[np.ndarray, " n"]) -> float:
    """Of the finite values; NaN without any."""
    finite = found[np.isfinite(found)]
    return float(finite.mean()) if len(finite) else math.nan


def partner_fate(study: ShiftStudy, number: int) -> str | None:
    """What became of the concept that the fine-tuned model has in its place; None without one."""
    partner = int(study.recovery.partner[number])
    return study.fates.fate[partner] if partner >= 0 else None


def concept_names(study: ShiftStudy, names: Sequence[str] | None) -> list[str]:
    """Per concept its label, with its name behind it where there are names.

    Raises:
        BadInputError: If there is not one name per concept.
    """
    _check_names(study, names)
    return [f"{study.label(number)} {names[number] if names else ''}".rstrip() for number in range(study.k)]


def _check_names(study: ShiftStudy, names: Sequence[str] | None) -> None:
    if names is not None and len(names) != study.k:
        raise BadInputError(f"{len(names)} names for {study.k} concepts; give one each")


def concept_rows(study: ShiftStudy, names: Sequence[str] | None = None) -> list[Row]:
    """One row per concept: rows, partner, consistency, magnitude, and of every score what the shift makes of it.

    Args:
        study: Whose concepts.
        names: What to call each concept beside its label, such as its words.

    Raises:
        BadInputError: If there is not one name per concept.
    """
    _check_names(study, names)
    scores = {score: _score_columns(study, score) for score in SCORES}
    rows = []
    for number in range(study.k):
        partner = int(study.recovery.partner[number])
        row: Row = {"concept": study.label(number)}
        if names is not None:
            row["words"] = names[number]
        row |= {
            "rows": int(study.recovery.counts[number]),
            "held_out": int(study.recovery.held_out[number]),
            "partner": study.tuned_label(partner) if partner >= 0 else None,
            "fate": partner_fate(study, number),
            "pairwise": float(study.shifts.pairwise[number]),
            "to_mean": float(study.shifts.to_mean[number]),
            "magnitude": float(study.shifts.magnitude[number]),
        }
        row |= {
            f"{score}_{column}": float(found[number]) for score, own in scores.items() for column, found in own.items()
        }
        rows.append(row)
    return rows


def _score_columns(study: ShiftStudy, score: str) -> dict[str, Float[np.ndarray, " k"]]:
    known = score in known_scores(study)
    nothing = np.full(study.k, np.nan)
    return {
        "unshifted": form_values(study, score, "unshifted"),
        "shifted": form_values(study, score, "shifted"),
        "gain": gain(study.recovery, score) if known else nothing,
        "relative_gain": relative_gain(study.recovery, score) if known else nothing,
    }


def form_rows(study: ShiftStudy) -> list[Row]:
    """One row per form: the mean of each score over the concepts that count (see `gains.counted`), and how many do."""
    kept = counted(study.recovery, study.settings.enough)
    return [
        {
            "form": form,
            "concepts": int(kept.sum()),
            **{score: mean(form_values(study, score, form)[kept]) for score in SCORES},
        }
        for form in FORMS
    ]


def comparison_rows(study: ShiftStudy) -> list[Row]:
    """One row per score and control: by how much moving a concept by its own shift is better (see `gains.compare`)."""
    rows, settings = [], study.settings
    for score in known_scores(study):
        for against in CONTROLS:
            found = compare(study.recovery, score, "shifted", against, enough=settings.enough, seed=settings.seed)
            rows.append({"score": score, "form": "shifted", "against": against, **asdict(found)})
    return rows


def summary(study: ShiftStudy, names: Sequence[str] | None = None) -> Row:
    """All that tables hold of a study, with settings, correlations, fates and counts; see `write_tables`."""
    fates = study.fates
    there = [number for number, fate in enumerate(fates.fate) if fate]
    return {
        "method": method_settings(study.fitted),
        "settings": asdict(study.settings),
        "signed": study.signed,
        "counts": {
            "concepts": study.k,
            "concepts of the fine-tuned model": len(study.tuned.directions),
            "with enough rows": int(counted(study.recovery, study.settings.enough).sum()),
            "rows": int(study.recovery.counts.sum()),
            "held-out rows": int(study.recovery.held_out.sum()),
            "unassigned rows": study.unassigned,
        },
        "empty": [study.label(number) for number in study.empty],
        "concepts": concept_rows(study, names),
        "forms": form_rows(study),
        "comparisons": comparison_rows(study),
        "correlations": {name: asdict(found) for name, found in study.correlations.items()},
        "fates": {
            "same": fates.same,
            "apart": fates.apart,
            **{fate: fates.count(fate) for fate in FATES},
            "lost": [study.label(number) for number in fates.lost],
            "concepts": [
                {
                    "concept": study.tuned_label(number),
                    "nearest": study.label(int(fates.nearest[number])),
                    "cosine": float(fates.cosine[number]),
                    "fate": fates.fate[number],
                }
                for number in there
            ],
        },
    }


def write_tables(
    studies: Studies,
    folder: str | Path,
    names: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """`concepts.csv`, `forms.csv`, `comparisons.csv` and `shift.json` into a folder, which is made.

    Args:
        studies: One study, or several by name, such as of several k: tables get a first column `study` then.
        folder: Where to.
        names: What to call each concept, see `concept_rows`; of several studies under their names.

    Raises:
        BadInputError: If the folder can't be made, if there are no studies, or names do not fit them.
    """
    several = {"": studies} if isinstance(studies, ShiftStudy) else dict(studies)
    if not several:
        raise BadInputError("there is no study to write tables of")
    if isinstance(names, Mapping) == isinstance(studies, ShiftStudy) and names is not None:
        raise BadInputError("names are a list for one study, and lists by its name for several")
    of = names if isinstance(names, Mapping) else {"": names}
    found = {name: summary(one, of.get(name) if of else None) for name, one in several.items()}
    out = output_folder(folder)
    for table in ("concepts", "forms", "comparisons"):
        rows = [
            ({} if isinstance(studies, ShiftStudy) else {"study": name}) | row
            for name, content in found.items()
            for row in content[table]
        ]
        _write_csv(rows, out / f"{table}.csv")
    whole = [{"study": name or None, **_strict(content)} for name, content in found.items()]
    (out / "shift.json").write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return out


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    """Columns in the order in which rows have them; a column that only some rows have is empty in the others."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: "" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
            for row in rows
        )


def _strict(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {name: _strict(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(value: float) -> str:
    """A number for people; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:z.3f}"


def interval(row: Row) -> str:
    """A comparison in words: mean gain, its interval, and how many concepts gain."""
    if not row["concepts"]:
        return "no concept has enough rows"
    # z: what rounds to 0 has no sign of its own.
    mean, low, high = ("–" if math.isnan(row[name]) else f"{row[name]:+z.3f}" for name in ("mean", "low", "high"))
    return (
        f"{mean} [{low}, {high}], better for {row['improved']:.0%}, worse for {row['worse']:.0%} of {row['concepts']}"
    )


def fate_counts(study: ShiftStudy) -> list[tuple[str, int]]:
    """Kept, specialised and new of the fine-tuned model's concepts, lost of the original's."""
    return [*((fate, study.fates.count(fate)) for fate in FATES), ("lost", len(study.fates.lost))]


def table(study: ShiftStudy) -> str:
    """Plain text: forms by scores, a line per comparison, correlations, fates, and what is empty."""
    scores = known_scores(study)
    forms = form_rows(study)
    count = forms[0]["concepts"]
    lines = [
        f"means over {count} of {study.k} concepts, those with {study.settings.enough} rows or more to shift by and to "
        "measure on"
    ]
    lines += text_columns([["", *scores], *([row["form"], *(figure(row[score]) for score in scores)] for row in forms)])
    lines += ["", "what the shift gains over (mean [95 % interval])"]
    lines += text_columns([[row["score"], row["against"], interval(row)] for row in comparison_rows(study)], 3)
    lines += ["", "correlations over concepts (Pearson's r [95 % interval], Spearman's rho)"]
    lines += text_columns(
        [
            [name, f"{figure(c.pearson)} [{figure(c.low)}, {figure(c.high)}]", figure(c.spearman), f"n = {c.concepts}"]
            for name, c in study.correlations.items()
        ]
    )
    lines += ["", "fates: " + ", ".join(f"{number} {fate}" for fate, number in fate_counts(study))]
    if study.empty:
        lines.append(f"without rows: concepts {', '.join(study.label(number) for number in study.empty)}")
    if study.unassigned:
        lines.append(f"{study.unassigned} rows activate no concept")
    return "\n".join(lines) + "\n"
