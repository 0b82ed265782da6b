"""What reports for people share: pages without outside resources, and text that Markdown leaves alone."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from concept_dict.grounding import Word
from hooked_mm.drawing import data_uri, enlarge

SIDE = 128
"""Pixels of the longer side of a sample's picture."""


def write_page(template: str, path: str | Path, *, package: str = "concept_dict", **context: Any) -> Path:
    """A page made of a template in a package's `templates/`: all text is escaped.

    In templates `picture(image)` is the address of a small picture, `picture(image, None)` of one as large as it is.

    Args:
        template: Its file name.
        path: Of the page.
        package: Whose template; what it extends or imports may be one of `concept_dict`.
        context: What it shows.
    """
    # dict: each package once.
    loader = ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, "concept_dict"))])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.globals["picture"] = _address
    page = environment.get_template(template).render(**context)
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def _address(image: Image.Image, side: int | None = SIDE) -> str:
    return data_uri(image if side is None else enlarge(image, side))


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, in a table too: one line, marks escaped, HTML and table bars as entities."""
    for mark in "\\`*_{}[]()#+-.!":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(html.escape(text, quote=False).replace("|", "&#124;").split())


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_words(words: Sequence[Word], marked: Collection[str] = ()) -> str:
    """Words with their probabilities as a table; those that are `marked` in bold."""
    rows = [(markdown_text(word.text), f"{word.probability:.3f}", word.text in marked) for word in words]
    return markdown_table(["word", "probability"], [[f"**{t}**" if bold else t, p] for t, p, bold in rows])
