"""Cards of a shift as a static HTML page and as a run of TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from concept_dict.page import markdown_table, markdown_text, markdown_words, write_page
from concept_dict.recovery import CONTROLS, FORMS, SCORES
from concept_dict.run_table import compare_runs
from concept_dict.shift_cards import ShiftCard, ShiftReport
from concept_dict.shift_plots import correlation_figure, figure_image, recovery_figure
from concept_dict.shift_tables import comparison_rows, figure, form_rows, interval, known_scores
from hooked_mm.drawing import enlarge, grid, titled

SIDE = 128


def write_html(report: ShiftReport, path: str | Path) -> Path:
    """The report as one page without outside resources; all text is escaped."""
    study = report.study
    figures = [
        ("Recovery before and after the shift", recovery_figure(study, names=report.names)),
        ("What recovery goes with", correlation_figure(study)),
    ]
    return write_page(
        "shift.html",
        path,
        report=report,
        scores=known_scores(study),
        forms=form_rows(study),
        form_meanings=FORMS,
        score_meanings=SCORES,
        controls=CONTROLS,
        compared={(r["against"], r["score"]): interval(r) for r in comparison_rows(study)},
        figures=[(caption, figure_image(drawn)) for caption, drawn in figures],
        number=figure,
    )


def card_markdown(card: ShiftCard) -> str:
    """A card as Markdown: numbers, then the words and samples of each form; words of the fine-tuned one in bold."""
    head = [markdown_text(name) for name, _ in card.numbers]
    parts = [f"### {markdown_text(card.title)}"]
    parts.append(markdown_table(head, [[markdown_text(value) for _, value in card.numbers]]))
    for form in card.forms:
        parts.append(f"#### {form.name}")
        if form.words:
            parts.append(markdown_words(form.words, form.shared))
        lines = (f"{n}. ({s.activation:.2f}) {markdown_text(s.text)}" for n, s in enumerate(form.samples, start=1))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def overview_markdown(report: ShiftReport) -> str:
    """Facts, forms, comparisons, and the concepts without a card."""
    study, scores = report.study, known_scores(report.study)
    parts = [f"# {markdown_text(report.title)}"]
    parts.append("\n".join(f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in report.facts))
    forms = [[row["form"], *(figure(row[score]) for score in scores)] for row in form_rows(study)]
    parts.append(markdown_table(["form", *scores], forms))
    compared = [[row["score"], row["against"], interval(row)] for row in comparison_rows(study)]
    parts.append(markdown_table(["score", "the shift over", "gains"], compared))
    for name, found in (("New", report.new), ("Lost", report.lost)):
        if found:
            lines = (f"- {a.label}: {markdown_text(', '.join(w.text for w in a.words))} ({a.why})" for a in found)
            parts.append(f"## {name}\n\n" + "\n".join(lines))
    if report.empty:
        parts.append(f"Without rows: {', '.join(report.empty)}")
    return "\n\n".join(parts) + "\n"


def sheet(card: ShiftCard) -> Image.Image | None:
    """The pictures of a card, a row per form, each below its form and how far it lies along it; None without any."""
    rows = [
        [
            titled(enlarge(s.image, SIDE), f"{form.name} {s.activation:.1f}", SIDE)
            for s in form.samples
            if s.image is not None
        ]
        for form in card.forms
    ]
    columns = max(map(len, rows))
    if not columns:
        return None
    # A form with fewer pictures still has a row of its own.
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    cells = [cell for row in rows for cell in [*row, *[blank] * (columns - len(row))]]
    return grid(cells, columns)


def write_tensorboard(report: ShiftReport, folder: str | Path) -> Path:
    """The report as a run of TensorBoard.

    Text: an overview and a card per concept. Images: per concept the samples of each form, and both figures.
    Histograms: how held-out rows moved along their concept's shift. Scalars and hparams: means per form and score, and
    what the shift gains over the controls, beside settings, so that runs compare.
    """
    study = report.study
    # TensorBoard's table of runs shows the first few.
    found = {f"gain in {row['score']}/over {row['against']}": row["mean"] for row in comparison_rows(study)}
    found |= {f"{score}/{row['form']}": row[score] for row in form_rows(study) for score in known_scores(study)}
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("overview", overview_markdown(report))
        writer.add_figure("shift/recovery", recovery_figure(study, names=report.names))
        writer.add_figure("shift/correlation", correlation_figure(study))
        for card in report.cards:
            words = ", ".join(word.text for word in card.forms[0].words[:2])
            tag = f"concepts/{card.index:02d} {words}".rstrip()
            writer.add_text(tag, card_markdown(card))
            pictures = sheet(card)
            if pictures is not None:
                writer.add_image(tag, np.asarray(pictures), dataformats="HWC")
            if len(card.cosines):
                writer.add_histogram(f"cosine of rows with the shift/{card.index:02d}", card.cosines)
        compare_runs(writer, report.settings, {tag: value for tag, value in found.items() if math.isfinite(value)})
    return Path(folder)
