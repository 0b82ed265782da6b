"""Concept cards: everything a person wants to see of a concept, gathered once and shown in several places.

The same cards go to TensorBoard, to a static HTML page and to JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from concept_dict.grounding import Word
from concept_dict.page import markdown_table, markdown_text, markdown_words, write_page
from concept_dict.projector import add_concepts
from concept_dict.run_table import Setting, compare_runs
from hooked_mm.drawing import grid

COLUMNS = 6


@dataclass(frozen=True)
class CardSample:
    """A sample that activates a concept: its picture, what was said of it, and how strongly.

    `image` is None where the picture can't be had; `where` is the concept drawn over it.
    """

    image: Image.Image | None
    text: str
    activation: float
    where: Image.Image | None = None

    @property
    def pictures(self) -> list[Image.Image]:
        """The picture, and the concept in it."""
        return [image for image in (self.image, self.where) if image is not None]


@dataclass(frozen=True)
class End:
    """What a concept means: words, samples, and the fact that it tells best.

    Attributes:
        words: Best first.
        samples: Strongest first.
        fact: None where no truth is known.
        held_out: AUROC of that fact on held-out samples.
        shuffled: The same with shuffled labels.
    """

    words: list[Word]
    samples: list[CardSample]
    fact: str | None = None
    held_out: float | None = None
    shuffled: float | None = None


@dataclass(frozen=True)
class ConceptCard:
    """One concept.

    Attributes:
        index: Which.
        end: What it means; of a signed method, where activations are positive.
        activations: Of all samples.
        other: Of a signed method, what -c_k means, by the samples of smallest activation.
    """

    index: int
    end: End
    activations: Float[np.ndarray, " samples"]
    other: End | None = None

    @property
    def title(self) -> str:
        """`concept 3: red, orange, purple`."""
        return f"concept {self.index}: {', '.join(word.text for word in self.end.words[:3]) or '(no whole word)'}"

    @property
    def ends(self) -> list[tuple[str, str, End]]:
        """What to show: the one end, or both; each with its concept's number for tables and with its name."""
        if self.other is None:
            return [(str(self.index), "", self.end)]
        return [
            (f"{self.index} +", "positive end", self.end),
            (f"{self.index} \N{MINUS SIGN}", "negative end", self.other),
        ]


@dataclass(frozen=True)
class Report:
    """Cards with what they are about.

    Attributes:
        title: What it is.
        facts: (name, value) pairs shown at the top.
        cards: The concepts.
        metrics: Scores of the whole dictionary.
        settings: What the dictionary was made with; TensorBoard compares runs by these.
        concepts: C (k, d) for the projector; none leaves it out.
    """

    title: str
    facts: list[tuple[str, str]]
    cards: list[ConceptCard]
    metrics: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    concepts: Float[Tensor, "k d"] | None = None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def card_markdown(card: ConceptCard) -> str:
    """A card as Markdown: words with probabilities, score, the samples' texts."""
    parts = [f"### {markdown_text(card.title)}"]
    for _, name, end in card.ends:
        if name:
            parts.append(f"#### {name}")
        if end.fact is not None:
            parts.append(
                f"Best fact **{markdown_text(end.fact)}**, held-out AUROC **{_number(end.held_out)}** "
                f"(shuffled labels {_number(end.shuffled)})"
            )
        parts.append(markdown_words(end.words))
        lines = (f"{n}. ({s.activation:.2f}) {markdown_text(s.text)}" for n, s in enumerate(end.samples, start=1))
        parts.append("Most activating:\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def overview_markdown(report: Report) -> str:
    """Facts, scores and one line per concept, or per end of one."""
    facts = "\n".join(f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in report.facts)
    parts = [f"# {markdown_text(report.title)}", facts]
    if report.metrics:
        metrics = [[markdown_text(name), f"{value:.4g}"] for name, value in report.metrics.items()]
        parts.append(markdown_table(["metric", "value"], metrics))
    rows = [
        [
            label,
            markdown_text(", ".join(w.text for w in end.words)),
            markdown_text(end.fact or ""),
            _number(end.held_out),
            _number(end.shuffled),
        ]
        for card in report.cards
        for label, _, end in card.ends
    ]
    parts.append(markdown_table(["concept", "words", "best fact", "held-out AUROC", "shuffled"], rows) + "\n")
    return "\n\n".join(parts)


def write_tensorboard(report: Report, folder: str | Path) -> Path:
    """The report as a run of TensorBoard.

    Text: an overview and a card per concept. Images: per concept its samples, each beside where the concept is in it.
    Histograms: activations. Projector: concepts with words, fact and thumbnail. Scalars and hparams: metrics beside
    settings, so that runs compare.
    """
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("overview", overview_markdown(report))
        for card in report.cards:
            tag = f"concepts/{card.index:02d} {', '.join(word.text for word in card.end.words[:2])}"
            writer.add_text(tag, card_markdown(card))
            for _, name, end in card.ends:
                shown = [picture for sample in end.samples for picture in sample.pictures]
                if shown:
                    sheet = grid(shown, COLUMNS)
                    writer.add_image(f"{tag} {name}".rstrip(), np.asarray(sheet), dataformats="HWC")
                if end.held_out is not None and end.shuffled is not None:
                    of = f", {name}" if name else ""
                    writer.add_scalar(f"AUROC by concept/held out{of}", end.held_out, card.index)
                    writer.add_scalar(f"AUROC by concept/shuffled labels{of}", end.shuffled, card.index)
            writer.add_histogram(f"activations/{card.index:02d}", card.activations)
        compare_runs(writer, report.settings, {f"metrics/{name}": float(v) for name, v in report.metrics.items()})
        if report.concepts is not None:
            columns: dict[str, Sequence[str]] = {
                "concept": [str(card.index) for card in report.cards],
                "word": [card.end.words[0].text if card.end.words else "" for card in report.cards],
                "words": [", ".join(word.text for word in card.end.words) for card in report.cards],
            }
            if any(card.end.fact for card in report.cards):
                columns["fact"] = [card.end.fact or "" for card in report.cards]
                columns["attribute"] = [(card.end.fact or "").split("=")[0] for card in report.cards]
            # The strongest alone: a mean over scenes with other things in them shows nothing.
            pictures = [[s.image for s in card.end.samples[:1] if s.image is not None] for card in report.cards]
            add_concepts(writer, report.concepts, columns, pictures)
    return Path(folder)


def write_html(report: Report, path: str | Path) -> Path:
    """The report as one page without outside resources; all text is escaped."""
    known = any(card.end.fact for card in report.cards)
    return write_page("report.html", path, report=report, facts_known=known, bars=_bars)


def _bars(activations: np.ndarray, bins: int = 24) -> list[float]:
    """Heights of a histogram of the activations that are not zero, 0 to 1."""
    counts, _ = np.histogram(activations[activations != 0], bins=bins)
    return [float(count) / max(1, counts.max()) for count in counts]


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or not math.isfinite(value) else float(value)


def write_json(report: Report, path: str | Path) -> Path:
    """The report as JSON, without the pictures."""
    cards = []
    for card in report.cards:
        content: dict[str, Any] = {"concept": card.index, **_end(card.end)}
        if card.other is not None:
            content["negative_end"] = _end(card.other)
        cards.append(content)
    whole = {
        "title": report.title,
        "facts": dict(report.facts),
        "settings": dict(report.settings),
        "metrics": {name: _finite(value) for name, value in report.metrics.items()},
        "concepts": cards,
    }
    Path(path).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return Path(path)


def _end(end: End) -> dict[str, Any]:
    return {
        "words": [{"text": word.text, "probability": word.probability} for word in end.words],
        "samples": [{"text": sample.text, "activation": sample.activation} for sample in end.samples],
        "fact": end.fact,
        "held_out_auroc": _finite(end.held_out),
        "shuffled_auroc": _finite(end.shuffled),
    }
