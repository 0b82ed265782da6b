"""Concept cards: everything a person wants to see of a concept, gathered once and shown in several places.

The same cards go to TensorBoard, to a static HTML page and to JSON.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from jinja2 import Environment, PackageLoader
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from concept_dict.grounding import Word
from hooked_mm.drawing import data_uri, enlarge, grid

COLUMNS = 6


@dataclass(frozen=True)
class CardSample:
    """A sample that activates a concept: its picture, what was said of it, and how strongly."""

    image: Image.Image
    text: str
    activation: float


@dataclass(frozen=True)
class ConceptCard:
    """One concept.

    `fact`, `held_out` and `shuffled` are None where no truth is known; `activations` are those of all samples.
    """

    index: int
    words: list[Word]
    samples: list[CardSample]
    activations: Float[np.ndarray, " samples"]
    fact: str | None = None
    held_out: float | None = None
    shuffled: float | None = None

    @property
    def title(self) -> str:
        """`concept 3: red, orange, purple`."""
        return f"concept {self.index}: {', '.join(word.text for word in self.words[:3]) or '(no whole word)'}"


@dataclass(frozen=True)
class Report:
    """Cards with what they are about; `facts` are (name, value) pairs shown at the top."""

    title: str
    facts: list[tuple[str, str]]
    cards: list[ConceptCard]


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, in a table too: one line, marks escaped, HTML and table bars as entities."""
    for mark in "\\`*_{}[]()#+-.!":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(html.escape(text, quote=False).replace("|", "&#124;").split())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def card_markdown(card: ConceptCard) -> str:
    """A card as Markdown: words with probabilities, score, the samples' texts."""
    words = "\n".join(f"| {_markdown(word.text)} | {word.probability:.3f} |" for word in card.words)
    samples = "\n".join(f"{n}. ({s.activation:.2f}) {_markdown(s.text)}" for n, s in enumerate(card.samples, start=1))
    score = (
        f"Best fact **{_markdown(card.fact)}**, held-out AUROC **{_number(card.held_out)}** "
        f"(shuffled labels {_number(card.shuffled)})"
        if card.fact is not None
        else ""
    )
    table = f"| word | probability |\n|---|---|\n{words}"
    return f"### {_markdown(card.title)}\n\n{score}\n\n{table}\n\nMost activating:\n\n{samples}\n"


def write_tensorboard(report: Report, folder: str | Path) -> Path:
    """One overview, and per concept a text card, an image grid of its samples and a histogram."""
    with SummaryWriter(str(folder)) as writer:
        rows = "\n".join(
            f"| {card.index} | {_markdown(', '.join(w.text for w in card.words))} | {_markdown(card.fact or '')} | "
            f"{_number(card.held_out)} | {_number(card.shuffled)} |"
            for card in report.cards
        )
        facts = "\n".join(f"- {_markdown(name)}: {_markdown(value)}" for name, value in report.facts)
        table = f"| concept | words | best fact | held-out AUROC | shuffled |\n|---|---|---|---|---|\n{rows}\n"
        writer.add_text("overview", f"# {_markdown(report.title)}\n\n{facts}\n\n{table}")
        for card in report.cards:
            tag = f"concepts/{card.index:02d} {', '.join(word.text for word in card.words[:2])}"
            writer.add_text(tag, card_markdown(card))
            if card.samples:
                sheet = grid([sample.image for sample in card.samples], COLUMNS)
                writer.add_image(tag, np.asarray(sheet), dataformats="HWC")
            writer.add_histogram(f"activations/{card.index:02d}", card.activations)
            if card.held_out is not None and card.shuffled is not None:
                writer.add_scalar("AUROC by concept/held out", card.held_out, card.index)
                writer.add_scalar("AUROC by concept/shuffled labels", card.shuffled, card.index)
    return Path(folder)


def write_html(report: Report, path: str | Path) -> Path:
    """The report as one page without outside resources; all text is escaped."""
    environment = Environment(loader=PackageLoader("concept_dict"), autoescape=True)
    page = environment.get_template("report.html").render(
        report=report, picture=lambda image: data_uri(enlarge(image, 128)), bars=_bars
    )
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def _bars(activations: np.ndarray, bins: int = 24) -> list[float]:
    """Heights of a histogram of the non-zero activations, 0 to 1."""
    counts, _ = np.histogram(activations[activations > 0], bins=bins)
    return [float(count) / max(1, counts.max()) for count in counts]


def write_json(report: Report, path: str | Path) -> Path:
    """The report as JSON, without the pictures."""
    cards: Sequence[dict[str, Any]] = [
        {
            "concept": card.index,
            "words": [{"text": word.text, "probability": word.probability} for word in card.words],
            "fact": card.fact,
            "held_out_auroc": card.held_out,
            "shuffled_auroc": card.shuffled,
            "samples": [{"text": sample.text, "activation": sample.activation} for sample in card.samples],
        }
        for card in report.cards
    ]
    content = {"title": report.title, "facts": dict(report.facts), "concepts": cards}
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return Path(path)
