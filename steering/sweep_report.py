"""A sweep as a static HTML page and as a run of TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from concept_dict.page import markdown_table, markdown_text, write_page
from concept_dict.shift_plots import figure_image
from steering.sweep_plots import figures
from steering.sweep_result import Row, SweepResult, number, steered, unsteered
from steering.sweep_tables import (
    DETAILS,
    Table,
    chosen_settings,
    front_rows,
    meaning,
    role_of,
    settings_table,
    shown_split,
    verdicts,
    where_name,
)

ABOUT = {
    "source": "Samples that shall change",
    "same type": "Other samples of the same type",
    "other": "Samples of other types",
}
"""What examples are about, in the order of the page."""


def write_html(result: SweepResult, path: str | Path, *, pictures: Callable[[int], Image.Image] | None = None) -> Path:
    """The sweep as one page without outside resources; all text is escaped.

    Args:
        result: The sweep.
        path: Of the page.
        pictures: An example's `picture` -> the picture; examples are shown without unless given.
    """
    split = shown_split(result)
    rows = front_rows(result, split) if result.rows else []
    chosen = chosen_settings(result)
    return write_page(
        "sweep.html",
        path,
        package="steering",
        report={"title": f"Steering: {result.name}", "facts": result.facts},
        meaning=meaning(result, rows),
        verdicts=verdicts(result),
        figures=[(caption, figure_image(drawn)) for caption, drawn in figures(result)],
        split=split,
        measured=any(math.isfinite(number(row, "damage")) for row in steered(rows)),
        front=settings_table(result, rows),
        settings=[(name, settings_table(result, _with_roles(result.of(name), chosen))) for name in result.splits()],
        examples=_examples(result, pictures),
        chosen=chosen,
    )


def _with_roles(rows: list[Row], chosen: set[int]) -> list[Row]:
    """All rows of a split as they stand, each with what it is."""
    return [{"role": role_of(row, chosen)} | row for row in rows]


def _examples(
    result: SweepResult, pictures: Callable[[int], Image.Image] | None
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Examples by what they are about, each with its picture or None."""
    found: dict[str, list[dict[str, Any]]] = {about: [] for about in ABOUT}
    for example in result.examples:
        there = pictures is not None and example.get("picture") is not None
        image = pictures(example["picture"]) if there and pictures is not None else None
        found.setdefault(str(example.get("about", "other")), []).append(example | {"image": image})
    return [(ABOUT.get(about, about), items) for about, items in found.items() if items]


def overview_markdown(result: SweepResult) -> str:
    """Facts, what is measured, verdict and the table of the front."""
    parts = [f"# {markdown_text(f'Steering: {result.name}')}"]
    parts.append("\n".join(f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in result.facts))
    parts += [markdown_text(text) for text in verdicts(result)]
    if result.rows:
        rows = front_rows(result, shown_split(result))
        parts.append("\n".join(f"- {name}: {markdown_text(text)}" for name, text in meaning(result, rows)))
        # Further scores would squeeze TensorBoard's columns to a letter each; the page and the files have them.
        parts.append(table_markdown(settings_table(result, rows, further=False)))
        alphas = ", ".join(f"{step} = {alpha:g}" for step, alpha in enumerate(_alphas(result)))
        parts.append(f"Steps of the scalars are places among the alphas: {markdown_text(alphas)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def table_markdown(table: Table) -> str:
    """A table of settings in Markdown."""
    cells = [[markdown_text(cell) for cell in line] for line in (table.head, *table.lines)]
    return markdown_table(cells[0], cells[1:])


def _alphas(result: SweepResult) -> list[float]:
    return sorted({float(row["alpha"]) for row in result.rows if not unsteered(row)})


def write_tensorboard(result: SweepResult, folder: str | Path) -> Path:
    """The sweep as a run of TensorBoard.

    Text: facts, verdict and the front. Images: the figures of the page. Scalars: effect and damage per split, vector
    and layer (or hook) over alpha; controls at a single alpha are no curves, and stand in the text alone. TensorBoard's
    steps are whole numbers: step n is the n-th of the sorted alphas, from 0; the text lists them.
    """
    alphas = _alphas(result)
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("sweep", overview_markdown(result))
        for caption, drawn in figures(result):
            writer.add_figure(f"sweep/{caption.split(',')[0]}", drawn)
        for split in result.splits():
            rows = result.of(split)
            mine = sorted((row for row in rows if not unsteered(row)), key=lambda row: float(row["alpha"]))
            names = series_names(mine)
            for row, name in zip(mine, names, strict=True):
                if row["control"] and names.count(name) == 1:
                    continue
                for score in ("effect", "damage"):
                    if math.isfinite(value := number(row, score)):
                        writer.add_scalar(f"{score} ({split})/{name}", value, alphas.index(float(row["alpha"])))
    return Path(folder)


def series_names(rows: Sequence[Row]) -> list[str]:
    """Per row vector and layer (or hook), with positions, operation and gate where these differ between the rows."""
    where = where_name(rows)
    details = [name for name in DETAILS if len({row[name] for row in rows}) > 1]
    found = []
    for row in rows:
        control = row["control"] if row["control"] not in str(row["vector"]) else ""
        parts = [f"{row['vector']} {control}".rstrip(), where(row)]
        found.append(", ".join([*parts, *(f"{name} {row[name]}" for name in details if row[name])]))
    return found
