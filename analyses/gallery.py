"""Galleries: what an analysis found of each sample, its pictures side by side, as pages that are one file each.

A page holds everything it shows and runs no script. What comes from a model, a data set or a user reaches it as text
alone; a policy in its head forbids everything else. A long gallery is several pages that lead to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from hooked_mm.drawing import bounded_uri
from hooked_mm.errors import BadInputError

ENTRIES, PICTURES = 40, 160
"""On a page at most."""

SIDE = 1200
"""Pixels of the longer side of a picture at most."""


@dataclass(frozen=True)
class Entry:
    """One sample of a gallery.

    Attributes:
        title: Its heading.
        facts: What is known of it, (name, value); numbers are shown with four digits.
        pictures: (caption, picture), in the order in which they are shown.
        text: A paragraph above the pictures; line breaks are kept.
    """

    title: str
    facts: Sequence[tuple[str, Any]] = ()
    pictures: Sequence[tuple[str, Image.Image]] = field(default_factory=tuple, repr=False)
    text: str = ""


def environment() -> Environment:
    """The templates of this package, everything put into them escaped."""
    made = Environment(
        loader=PackageLoader("analyses"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["shown"] = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    return made


def in_pages(entries: Sequence[Entry], most: int = ENTRIES, pictures: int = PICTURES) -> list[list[Entry]]:
    """Entries as they are dealt out to pages; one with more pictures than a page holds goes on in further entries.

    Args:
        entries: All.
        most: Entries on a page.
        pictures: Pictures on a page.

    Returns:
        One page at least.
    """
    pages: list[list[Entry]] = [[]]
    for entry in entries:
        parts = [entry.pictures[start : start + pictures] for start in range(0, len(entry.pictures), pictures)]
        for number, part in enumerate(parts or [()]):
            shown = sum(len(other.pictures) for other in pages[-1])
            if len(pages[-1]) >= most or (pages[-1] and shown + len(part) > pictures):
                pages.append([])
            title = f"{entry.title} ({number + 1} of {len(parts)})" if len(parts) > 1 else entry.title
            pages[-1].append(replace(entry, title=title, pictures=part))
    return pages


def write_gallery(
    path: str | Path, title: str, entries: Sequence[Entry], notes: Sequence[str] = (), *, side: int = SIDE
) -> Path:
    """Write a gallery; pages behind the first stand beside it: `NAME-2.html`, `NAME-3.html`, ...

    Args:
        path: Of the first page, ending in `.html`.
        title: Of every page.
        entries: What is shown, in its order.
        notes: What a reader must know first; on every page.
        side: Longer side of a picture in pixels, at most; pictures are never made larger than they are.

    Returns:
        The first page's path.

    Raises:
        BadInputError: If the path does not end in `.html`.
    """
    first = Path(path)
    if first.suffix != ".html":
        raise BadInputError(f"a gallery at {str(path)!r} would open in no browser; let its name end in .html")
    pages = in_pages(entries)
    names = [first.name, *(f"{first.stem}-{number + 2}.html" for number in range(len(pages) - 1))]
    made = environment()
    made.filters["uri"] = lambda image: bounded_uri(image, side)
    template = made.get_template("gallery.html")
    for number, (name, page) in enumerate(zip(names, pages, strict=True)):
        text = template.render(
            title=title,
            notes=notes,
            entries=page,
            names=names,
            number=number,
            total=len(entries),
            several=len(names) > 1,
        )
        # Halves of characters, which no file can hold, are written by their names.
        first.with_name(name).write_text(text, encoding="utf-8", errors="backslashreplace")
    return first
