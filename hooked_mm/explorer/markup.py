"""Panels, conversations and patches as HTML for the explorer's page; everything from a model or a person as text.

| in `templates/` | what |
|---|---|
| `panels.html` | a macro for every kind of panel, by its class's name |
| `conversation.html` | what was said and shown, the newest in sight |
| `patches.html` | pictures under their grids of patches |
| `sides.html` | two parts side by side |
| `page.html` | a page of its own, for downloads |
| `explorer.css` | how all of it looks, in light and dark; colours of values are added here |
| `click.js` | what a click, a key and the arrow keys do |
| `shrink.js` | large pictures are scaled down before they reach the editor |

What can be clicked is a button with the attribute `data-pick`: JSON, which the page's Python gets. In a `data-across`
container (a table of colours, a grid of patches) Tab reaches one button and the arrow keys the others.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from hooked_mm.drawing import bounded_uri
from hooked_mm.explorer.asked import Patches
from hooked_mm.explorer.conversation import Conversation
from hooked_mm.explorer.panels import Heat, Panel, Table, Words

MOST_CELLS = 10_000
"""Cells of a table of colours at most; rows below are left out, which is said under it."""

LEVELS = 20
"""Steps of colour, above zero and below."""

SHARP = 12
"""Pictures of a panel up to which each comes with twice the pixels that it is shown with."""

THUMBNAIL, PATCHED = 160, 640
"""Pixels of the longer side of a picture in the conversation, and under a grid of patches, at most."""

RAMPS = {
    "light": ((255, 247, 235), (253, 170, 70), (140, 30, 0), (238, 246, 255), (90, 170, 240), (5, 30, 120)),
    "dark": (
        (58, 38, 30),
        (200, 72, 10),
        (255, 225, 60),
        (26, 42, 66),
        (20, 96, 200),
        (110, 240, 255),
    ),
}
"""By theme: red, green and blue near zero, in the middle and at the peak; above zero, then below."""

Colour = tuple[int, int, int]


def luminance(colour: Colour) -> float:
    """Relative luminance as WCAG 2 defines it, from 0 to 1."""
    parts = [
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in (c / 255 for c in colour)
    ]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def level_colour(theme: str, level: int) -> Colour:
    """The colour of a level, from -`LEVELS` to `LEVELS` without 0."""
    start, middle, end = RAMPS[theme][:3] if level > 0 else RAMPS[theme][3:]
    share = abs(level) / LEVELS
    low, high, part = (start, middle, 2 * share) if share <= 0.5 else (middle, end, 2 * share - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def level_css() -> str:
    """A rule per level and theme; text on a colour is black or white, whichever stands out more."""
    rules = []
    for theme in RAMPS:
        for level in (*range(-LEVELS, 0), *range(1, LEVELS + 1)):
            colour = level_colour(theme, level)
            # Against black the contrast is (y + .05) / .05, against white 1.05 / (y + .05): equal at y = .179.
            text = "#000" if luminance(colour) > 0.179 else "#fff"
            within = ".dark .hm" if theme == "dark" else ".hm"
            rules.append(f"{within} .{level_class(level)}{{background:rgb{colour};color:{text}}}".replace(", ", ","))
    return "\n".join(rules)


def level_class(level: int) -> str:
    """The class of a level in the style sheet; that of 0 has no colour."""
    return f"hm-{'n' if level < 0 else 'p'}{abs(level)}"


def value_class(value: float, peak: float) -> str:
    """The class of a value; NaN has its own."""
    if math.isnan(value):
        return "hm-none"
    return level_class(round(max(-1.0, min(1.0, value / peak)) * LEVELS))


def peak_of(values: Sequence[float], peak: float | None) -> float:
    """The size of a value in full colour: the largest finite one unless given, and never zero."""
    sizes = [abs(value) for value in values if math.isfinite(value)]
    found = peak if peak is not None else max(sizes, default=0.0)
    return found if found > 0 else 1.0


def shown(value: Any) -> str:
    """A value as people read it: numbers with four digits, truth as yes or no."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def is_number(value: Any) -> bool:
    """Whether a value stands in a column of numbers."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def numeric_columns(table: Table) -> list[bool]:
    """Whether every value of a column is a number or missing."""
    return [all(is_number(row[column]) for row in table.rows) for column in range(len(table.columns))]


def word_text(text: str) -> str:
    """A token as it is shown: never empty, line breaks visible."""
    return text.replace("\r", "").replace("\n", "↵") or "∅"


def heat_data(heat: Heat) -> dict[str, Any]:
    """What the template of a table of colours needs."""
    rows, columns = len(heat.rows), len(heat.columns)
    kept = min(rows, max(1, MOST_CELLS // max(1, columns)))
    values = heat.values.detach().cpu().tolist()
    # What is left out does not change the colours of what is shown.
    peak = peak_of([value for row in values for value in row], heat.peak)
    down, across = heat.picks
    parts = [part.strip() for part in heat.corner.split("\\")] if heat.corner.count("\\") == 1 else ["", ""]
    names = [
        [label if not part or label.startswith(part) else f"{part} {label}" for label in labels]
        for part, labels in zip(parts, (heat.rows, heat.columns), strict=True)
    ]
    cells: list[list[dict[str, Any]]] = []
    for row in range(kept):
        line = []
        for column, value in enumerate(values[row]):
            pick: dict[str, Any] = {}
            if down is not None:
                pick[down] = row if heat.row_values is None else heat.row_values[row]
            if across is not None:
                pick[across] = column if heat.column_values is None else heat.column_values[column]
            text = heat.texts[row][column] if heat.texts is not None else ""
            line.append(
                {
                    "css": value_class(value, peak),
                    "told": f"{names[0][row]}, {names[1][column]}: {text + ' · ' if text else ''}{shown(value)}",
                    "text": text,
                    "pick": pick,
                }
            )
        cells.append(line)
    longest = max((len(name) for name in heat.columns), default=0)
    return {
        "cells": cells,
        "left_out": rows - kept,
        "upright": heat.texts is None and longest > (4 if columns <= 12 else 2),
        "size": "hm-worded"
        if heat.texts is not None
        else "hm-large"
        if columns <= 12
        else "hm-small"
        if columns > 40
        else "",
        "scale": scale([value for row in values for value in row], peak),
        "clickable": down is not None or across is not None,
    }


def words_data(panel: Words) -> dict[str, Any]:
    """What the template of coloured tokens needs."""
    values = [float(value) for _, value in panel.words]
    peak = peak_of(values, panel.peak)
    words = [
        {
            "text": word_text(text),
            "told": shown(value),
            "css": value_class(value, peak),
            "pick": panel.picks[number] if panel.picks else None,
        }
        for number, ((text, _), value) in enumerate(zip(panel.words, values, strict=True))
    ]
    return {"words": words, "scale": scale(values, peak) if any(map(math.isfinite, values)) else None}


def scale(values: Sequence[float], peak: float) -> dict[str, Any]:
    """The legend of colours: its ends, and its steps between them."""
    low = -LEVELS if any(value < 0 for value in values) else 0
    return {
        "low": shown(-peak if low else 0),
        "high": shown(peak),
        "steps": [level_class(level) for level in range(low, LEVELS + 1, 2)],
    }


class _Uris:
    """Addresses of pictures that are shown again and again, each kept as long as its picture is.

    The picture itself is compared, not only its number: one that has gone may leave its number to another visitor's.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[weakref.ref[Image.Image], str]] = {}

    def get(self, image: Image.Image, side: int) -> str:
        key = (id(image), side)
        found = self._kept.get(key)
        if found is None or found[0]() is not image:
            found = (weakref.ref(image, lambda _: self._kept.pop(key, None)), bounded_uri(image, side))
            self._kept[key] = found
        return found[1]


_URIS = _Uris()


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) of a picture as it is shown, its longer side `side` pixels."""
    longer = max(size)
    return max(1, round(size[0] * side / longer)), max(1, round(size[1] * side / longer))


def patched(image: Image.Image, patches: Patches | None) -> dict[str, Any]:
    """Where picture and grid lie on a canvas that holds both, in percent of it, and how large it is, in pixels."""
    left, top, right, bottom = (0.0, 0.0, float(image.width), float(image.height)) if patches is None else patches.box
    canvas = (min(0.0, left), min(0.0, top), max(image.width, right), max(image.height, bottom))
    width, height = canvas[2] - canvas[0], canvas[3] - canvas[1]

    # Cells of a fine grid stay large enough to hit.
    side = 320 if patches is None else min(560, max(320, 10 * max(patches.rows, patches.cols)))

    def placed(box: tuple[float, float, float, float]) -> str:
        parts = {
            "left": (box[0] - canvas[0]) / width,
            "top": (box[1] - canvas[1]) / height,
            "width": (box[2] - box[0]) / width,
            "height": (box[3] - box[1]) / height,
        }
        return ";".join(f"{name}:{100 * share:.4f}%" for name, share in parts.items())

    return {
        "shape": f"{width:.4g}/{height:.4g}",
        "width": max(40, fitted((round(width), round(height)), side)[0]),
        "image": placed((0, 0, image.width, image.height)),
        "grid": placed((left, top, right, bottom)),
    }


def panels_html(panels: Sequence[Panel]) -> str:
    """Panels, from above to below."""
    return _render("panels.html", panels=panels)


def sides_html(sides: Sequence[tuple[str, str]]) -> str:
    """Parts side by side, under each other where the page is narrow.

    Args:
        sides: (heading, HTML that was made here) of one or two; of one the heading is left out.
    """
    return _render("sides.html", sides=[(heading, Markup(part)) for heading, part in sides])


def conversation_html(conversation: Conversation, pending: str | None = None, title: str = "") -> str:
    """What was said and shown.

    Args:
        conversation: All turns.
        pending: The last turn's answer so far, while it is generated.
        title: Above it.
    """
    return _render("conversation.html", turns=conversation.turns, pending=pending, title=title, side=THUMBNAIL)


def patches_html(
    pictures: Sequence[tuple[Image.Image, Patches | None]], chosen: Sequence[tuple[int, int, int]] = ()
) -> str:
    """Pictures under their grids of patches, to click.

    Args:
        pictures: (picture, its grid); without a grid its patches can't be told apart, which is said.
        chosen: (picture, row, column) of the patches that are marked.
    """
    return _render("patches.html", pictures=pictures, chosen=set(chosen), patched=patched, side=PATCHED)


def page_html(title: str, parts: Sequence[str]) -> str:
    """A page in a single file, which may run no script and ask for nothing.

    Args:
        title: Of the page.
        parts: HTML that was made here, from above to below.
    """
    return _render("page.html", title=title, parts=[Markup(part) for part in parts], css=Markup(CSS))


def _environment() -> Environment:
    """The templates; everything put into them is escaped."""
    made = Environment(
        loader=PackageLoader("hooked_mm.explorer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"shown": shown, "uri": _URIS.get, "new_uri": bounded_uri, "word": word_text, "fitted": fitted}
    made.globals |= {
        "heat_data": heat_data,
        "words_data": words_data,
        "numeric_columns": numeric_columns,
        "kind": lambda panel: type(panel).__name__,
        "SHARP": SHARP,
    }
    return made


def _render(name: str, **values: Any) -> str:
    # Halves of characters can't be sent; they are written by their names.
    return _TEMPLATES.get_template(name).render(**values).encode("utf-8", "backslashreplace").decode()


def _file(name: str) -> str:
    return (files("hooked_mm.explorer") / "templates" / name).read_text(encoding="utf-8")


_TEMPLATES = _environment()

CSS = _file("explorer.css") + level_css()
"""The style sheet of everything made here; it names nothing but what stands in an element of class `hm`."""

CLICK_JS = _file("click.js")
"""For `gr.HTML(js_on_load=...)`: a click on what has a `data-pick` triggers the event `click` with `pick`."""

SHRINK_JS = _file("shrink.js")
"""For the page's start: pictures that are larger than the editor can bear are scaled down before they reach it."""
