"""What a fine-tuning did to each concept, for people: original, shifted and fine-tuned form side by side.

What is shown is what was scored: words and samples of a form are those that `recovery.recover` compares, on the same
rows. The same report goes to a static HTML page and to TensorBoard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.tensorboard import SummaryWriter

from concept_dict.cards import CardSample
from concept_dict.gains import ENOUGH, counted
from concept_dict.grounding import Word
from concept_dict.page import markdown_table, markdown_text, markdown_words, write_page
from concept_dict.recovery import CONTROLS, Concepts, along, top_by_direction
from concept_dict.run_table import Setting, compare_runs, method_settings
from concept_dict.shift import movements
from concept_dict.shift_plots import correlation_figure, figure_image, recovery_figure
from concept_dict.shift_study import Part, ShiftStudy
from concept_dict.shift_tables import (
    comparison_rows,
    fate_counts,
    figure,
    form_rows,
    form_values,
    interval,
    known_scores,
    partner_fate,
)
from hooked_mm.drawing import enlarge, grid, titled
from hooked_mm.errors import BadInputError

Decode = Callable[[Tensor], list[list[Word]]]
"""Directions (k, d), of any length -> the top words of each."""
SIDE = 128


@dataclass(frozen=True)
class Form:
    """A concept in one of its forms.

    Attributes:
        name: `original`, `shifted` or `fine-tuned`.
        words: Best first.
        samples: Those with the row that lies farthest along it, and how far; with what the model said whose rows they
            are.
        shared: Words that the fine-tuned form has too; of itself none.
    """

    name: str
    words: list[Word]
    samples: list[CardSample]
    shared: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ShiftCard:
    """One concept of the original.

    Attributes:
        index: Which.
        label: As people are shown it.
        forms: Original and shifted and, if it has a partner, fine-tuned.
        numbers: (name, value) pairs.
        cosines: Of Delta_k with what happened to each of its held-out rows.
    """

    index: int
    label: str
    forms: list[Form]
    numbers: list[tuple[str, str]]
    cosines: Float[np.ndarray, " n"]

    @property
    def title(self) -> str:
        """`concept 3: red, orange`; the label alone where nothing was decoded."""
        words = ", ".join(word.text for word in self.forms[0].words[:3])
        return f"concept {self.label}: {words}" if words else f"concept {self.label}"


@dataclass(frozen=True)
class Alone:
    """A concept that the other model has nothing for: its words, and why it stands here."""

    label: str
    words: list[Word]
    why: str


@dataclass(frozen=True)
class ShiftReport:
    """Cards with what they are about.

    Attributes:
        title: What it is.
        facts: (name, value) pairs shown at the top.
        study: Its numbers.
        cards: Concepts with rows.
        empty: Labels of those without.
        new: Concepts of the fine-tuned model that are new, or no concept's partner.
        lost: Concepts of the original that nothing is left of.
        names: What concepts are called in figures; None where nothing was decoded.
        enough: Rows that a concept needs to count.
        settings: TensorBoard compares runs by these.
    """

    title: str
    facts: list[tuple[str, str]]
    study: ShiftStudy
    cards: list[ShiftCard]
    empty: list[str]
    new: list[Alone]
    lost: list[Alone]
    names: list[str] | None = None
    enough: int = ENOUGH
    settings: Mapping[str, Setting] = field(default_factory=dict)


def build_report(
    study: ShiftStudy,
    measure: Part,
    *,
    decoders: tuple[Decode, Decode] | None = None,
    pictures: Callable[[int], list[Image.Image]] | None = None,
    texts: tuple[Sequence[str], Sequence[str]] | None = None,
    title: str = "Shift of concepts",
    facts: Sequence[tuple[str, str]] = (),
    hook: str = "",
    models: tuple[str, str] = ("", ""),
    count: int = 6,
    enough: int = ENOUGH,
) -> ShiftReport:
    """Gather what a person wants to see of a study.

    Args:
        study: Of which concepts.
        measure: The part that it was measured on; samples are taken from it.
        decoders: What directions decode to in the original and in the fine-tuned model; none leaves words out.
        pictures: The pictures of a sample by its number in `measure`; the first is shown.
        texts: What the original and the fine-tuned model said of each sample, by the same number.
        title: Of the report.
        facts: (name, value) pairs to show on top of its own.
        hook: Where rows were read.
        models: The names of both.
        count: Samples per form.
        enough: Rows that a concept needs to count, see `gains.counted`.

    Raises:
        BadInputError: If no sample is to be shown, or a text is missing.
    """
    if count < 1:
        raise BadInputError(f"count={count}; show at least one sample per form")
    last = int(measure.sample.max())
    for name, said in zip(("original", "fine-tuned model"), texts or (), strict=False):
        if len(said) <= last:
            raise BadInputError(f"{len(said)} texts of the {name}, but rows of sample {last}; give one per sample")
    shown = [number for number in range(study.k) if study.shifts.counts[number]]
    partner = study.recovery.partner[shown]
    # Name, directions of those shown, whose rows and words: 0 of the original, 1 of the fine-tuned model.
    kinds = [
        ("original", study.original.vectors[shown], 0),
        ("shifted", study.shifted[shown], 1),
        ("fine-tuned", study.tuned.vectors[partner], 1),
    ]
    words = {name: _decode(decoders, of, directions) for name, directions, of in kinds}
    rows = [one.float() - side.mean for one, side in zip(_both(measure), (study.original, study.tuned), strict=True)]
    samples = {
        name: _samples(directions, rows[of], measure.sample, count, pictures, texts[of] if texts else None)
        for name, directions, of in kinds
    }
    cosines = _row_cosines(study, measure)
    kept = counted(study.recovery, enough)
    cards = []
    for place, number in enumerate(shown):
        theirs = frozenset(word.text for word in words["fine-tuned"][place])
        forms = [
            Form(name, words[name][place], samples[name][place], frozenset() if name == "fine-tuned" else theirs)
            for name, _, _ in kinds
            if name != "fine-tuned" or partner[place] >= 0
        ]
        numbers = _numbers(study, number)
        if not kept[number]:
            numbers.append(("in means", f"not counted: no partner, or fewer than {enough} rows"))
        cards.append(ShiftCard(number, study.label(number), forms, numbers, cosines[number]))
    new, lost = _alone(study, decoders)
    names: list[str] | None = None
    if decoders is not None:
        names = [""] * study.k
        for place, number in enumerate(shown):
            names[number] = ", ".join(word.text for word in words["original"][place][:2])
    settings: dict[str, Setting] = {
        **method_settings(study.fitted),
        "alpha": study.settings.alpha,
        "average": study.settings.average,
        "hook": hook,
        "original": models[0],
        "fine-tuned": models[1],
    }
    about = [*_about(study, measure, hook, models), *facts]
    empty = [study.label(number) for number in study.empty]
    return ShiftReport(title, about, study, cards, empty, new, lost, names, enough, settings)


def _both(part: Part) -> tuple[Tensor, Tensor]:
    return part.original, part.tuned


def _decode(decoders: tuple[Decode, Decode] | None, of: int, directions: Float[Tensor, "k d"]) -> list[list[Word]]:
    return decoders[of](directions) if decoders is not None and len(directions) else [[] for _ in directions]


def _samples(
    directions: Float[Tensor, "k d"],
    rows: Float[Tensor, "n d"],
    sample: Int[np.ndarray, " n"],
    count: int,
    pictures: Callable[[int], list[Image.Image]] | None,
    texts: Sequence[str] | None,
) -> list[list[CardSample]]:
    """Per direction its most activating samples, as cards show them."""
    present, pooled = along(directions, rows, sample)
    row = {int(number): place for place, number in enumerate(present)}
    return [
        [
            CardSample(
                next(iter(pictures(number)), None) if pictures is not None else None,
                texts[number] if texts is not None else f"sample {number}",
                float(pooled[row[number], column]),
            )
            for number in best
        ]
        for column, best in enumerate(top_by_direction(directions, rows, sample, count))
    ]


def _row_cosines(study: ShiftStudy, measure: Part) -> list[Float[np.ndarray, " n"]]:
    """Per concept the cosine of each of its held-out rows' movement with Delta_k; 0 of those that did not move."""
    main = Concepts.of(study.fitted, measure.original, study.signed).main
    deltas = movements(*_both(measure))
    return [cosine_similarity(deltas[main == k], study.shifts.vectors[k], dim=1).numpy() for k in range(study.k)]


def _change(study: ShiftStudy, score: str, number: int) -> str:
    before, after = (float(form_values(study, score, form)[number]) for form in ("unshifted", "shifted"))
    return f"{figure(before)} → {figure(after)}"


def _numbers(study: ShiftStudy, number: int) -> list[tuple[str, str]]:
    """What a card says below the forms."""
    recovery, shifts = study.recovery, study.shifts
    fate = partner_fate(study, number)
    called = {"cosine": "cosine", "distance": "distance", "words": "T-overlap", "samples": "sample overlap"}
    changes = [(name, _change(study, score, number)) for score, name in called.items() if score in known_scores(study)]
    return [
        ("rows", str(int(recovery.counts[number]))),
        ("held-out rows", str(int(recovery.held_out[number]))),
        ("consistency", f"{figure(float(shifts.pairwise[number]))}, to mean {figure(float(shifts.to_mean[number]))}"),
        ("magnitude", figure(float(shifts.magnitude[number]))),
        *(changes if fate else []),
        ("partner", f"{study.tuned_label(int(recovery.partner[number]))}, {fate}" if fate else "none"),
    ]


def _alone(study: ShiftStudy, decoders: tuple[Decode, Decode] | None) -> tuple[list[Alone], list[Alone]]:
    """Concepts of the fine-tuned model without a counterpart, and of the original."""
    fates = study.fates
    partners = {int(number) for number in study.recovery.partner}
    theirs = [j for j, fate in enumerate(fates.fate) if fate == "new" or (fate and j not in partners)]
    new = [
        Alone(
            study.tuned_label(j),
            words,
            f"{fates.fate[j]}{'' if j in partners else ', no partner'}; nearest {study.label(int(fates.nearest[j]))}, "
            f"cosine {figure(float(fates.cosine[j]))}",
        )
        for j, words in zip(theirs, _decode(decoders, 1, study.tuned.vectors[theirs]), strict=True)
    ]
    why = f"no concept of the fine-tuned model has a cosine of {fates.apart:.2f} or more with it"
    gone = _decode(decoders, 0, study.original.vectors[fates.lost])
    return new, [Alone(study.label(k), words, why) for k, words in zip(fates.lost, gone, strict=True)]


def _about(study: ShiftStudy, measure: Part, hook: str, models: tuple[str, str]) -> list[tuple[str, str]]:
    settings, recovery = study.settings, study.recovery
    trim = f" ({settings.trim:g} at each end)" if settings.average == "trimmed" else ""
    found = [
        ("original", models[0]),
        ("fine-tuned", models[1]),
        ("representations", hook),
        ("dictionary", f"{study.fitted}"),
        ("shift", f"{settings.average}{trim} of the rows' movements, times {settings.alpha:g}"),
        (
            "rows",
            f"{int(recovery.counts.sum())} to shift by ({study.unassigned} more activate no concept), "
            f"{len(measure.sample)} of {len(np.unique(measure.sample))} other samples to measure on",
        ),
        ("fates", ", ".join(f"{number} {fate}" for fate, number in fate_counts(study))),
    ]
    return [(name, value) for name, value in found if value]


def write_html(report: ShiftReport, path: str | Path) -> Path:
    """The report as one page without outside resources; all text is escaped."""
    study = report.study
    figures = [
        ("Recovery before and after the shift", recovery_figure(study, names=report.names, enough=report.enough)),
        ("What recovery goes with", correlation_figure(study, report.names, report.enough)),
    ]
    return write_page(
        "shift.html",
        path,
        report=report,
        scores=known_scores(study),
        forms=form_rows(study, report.enough),
        controls=CONTROLS,
        compared={(r["against"], r["score"]): interval(r) for r in comparison_rows(study, report.enough)},
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
    forms = [[row["form"], *(figure(row[score]) for score in scores)] for row in form_rows(study, report.enough)]
    parts.append(markdown_table(["form", *scores], forms))
    compared = [[row["score"], row["against"], interval(row)] for row in comparison_rows(study, report.enough)]
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
    rows = [[(form.name, s) for s in form.samples if s.image is not None] for form in card.forms]
    columns = max(map(len, rows))
    if not columns:
        return None
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    shown = [
        titled(enlarge(sample.image, SIDE), f"{name} {sample.activation:.1f}", SIDE)
        for row in rows
        for name, sample in row
        if sample.image is not None
    ]
    # A form with fewer pictures still has a row of its own.
    cells: list[Image.Image] = []
    for row in rows:
        cells += [*shown[: len(row)], *[blank] * (columns - len(row))]
        shown = shown[len(row) :]
    return grid(cells, columns)


def write_tensorboard(report: ShiftReport, folder: str | Path) -> Path:
    """The report as a run of TensorBoard.

    Text: an overview and a card per concept. Images: per concept the samples of each form, and both figures. Histograms:
    how held-out rows moved along their concept's shift. Scalars and hparams: means per form and score, and what the
    shift gains over the controls, beside settings, so that runs compare.
    """
    study = report.study
    found = {
        f"{score}/{row['form']}": row[score] for row in form_rows(study, report.enough) for score in known_scores(study)
    }
    for row in comparison_rows(study, report.enough):
        found[f"gain in {row['score']}/over {row['against']}"] = row["mean"]
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("overview", overview_markdown(report))
        writer.add_figure("shift/recovery", recovery_figure(study, names=report.names, enough=report.enough))
        writer.add_figure("shift/correlation", correlation_figure(study, report.names, report.enough))
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
