"""The explorer's geometry: how a conversation's representations lie, layer by layer, images beside text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from analyses.anisotropy import unit
from analyses.curves import Curve, curves_figure
from analyses.head_figure import as_picture
from analyses.logit_lens import STREAM
from analyses.position_geometry import (
    MASSIVE,
    MEANS,
    MEASURES,
    PositionRows,
    measured,
    position_rows,
    why_not,
)
from analyses.position_map import MOST_LABELS, map_figure, principal_map
from analyses.tab_maps import position_words
from hooked_mm.explorer import tab
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Facts, Note, Panel, Picture, Pictures, Table
from hooked_mm.explorer.tab import Choice, Control, Number, Toggle
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM

POINTS = {
    STREAM: "residual stream",
    "resid_mid": "residual stream between attention and MLP",
    "attn_out": "what attention adds",
    "mlp_out": "what the MLP adds",
}
TITLES = {name: measure.title for name, measure in MEASURES.items()} | {MEANS: "cosine of image mean and text mean"}
ON_MAP = {"all": "images and text", "text": "text alone", "image": "images alone"}
MOST_TOLD, SIDE = 3, 560
"""Massive positions that are named; pixels of a picture."""


class GeometryTab:
    """See the module."""

    name, title, order = "geometry", "Geometry", 80
    about = (
        "How the representations of this conversation lie, layer by layer, image positions beside text: norms, "
        "anisotropy, cosines, linearity, dimension, and a map of a layer. One conversation has few positions; what "
        "they can't tell is said."
    )

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """What is measured, of which point, and the layer of the map."""
        there = [
            (label, name)
            for name, label in POINTS.items()
            if name == STREAM or any(hook.endswith(f".hook_{name}") for hook in _blocks(model))
        ]
        layers = model.cfg.n_layers
        massive = f"over {MASSIVE} times the median norm, as attention sinks have; one alone can make a direction"
        return [
            Choice("measure", "Measure", [(title, name) for name, title in TITLES.items()], "norm"),
            Choice("point", "Point", there, STREAM),
            Number("layer", "Layer of the map", 0, layers, layers // 2, info="behind so many blocks"),
            Choice("on_map", "On the map", [(label, name) for name, label in ON_MAP.items()], "all"),
            Toggle("unit", "Map directions only", True, "each position divided by its norm"),
            Toggle("ordinary", "Leave out positions of massive norm", info=massive),
        ]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> tab.View:
        """See `hooked_mm.explorer.tab`.

        Raises:
            BadInputError: If the point has no such layer, or fewer than three positions differ.
        """
        work.step("running the model")
        every = position_rows(asked.model, asked.batch, values["point"])
        rows = every.ordinary() if values["ordinary"] else every
        found = measured(rows, values["measure"], work.step)
        work.step("drawing the map")
        mapped = rows.of(values["on_map"])
        at = mapped.at(values["layer"])
        placed, shares = principal_map(unit(at) if values["unit"] else at)
        panels = [*_facts(every, rows), *_warnings(asked, every, values), *_told(rows, values["measure"])]
        panels += [Pictures([_curves(rows, found, values), _map(asked, mapped, placed, shares, values)], side=SIDE)]
        panels.append(_table(rows, found, values))
        labelled = int((~mapped.image).sum())
        if labelled > MOST_LABELS:
            panels.append(Note(f"Of {labelled} text positions on the map the first {MOST_LABELS} may be labelled."))
        of_map = {"map_positions": mapped.position, "map": placed, "map_shares": shares}
        arrays = {**found, "positions": rows.position, **of_map}
        return tab.View(panels, _python(values), arrays)


def _blocks(model: HookedMM) -> list[str]:
    return [name for name in model.hook_names if name.startswith("blocks.")]


def _facts(every: PositionRows, rows: PositionRows) -> list[Panel]:
    image = int(rows.image.sum())
    facts = [
        ("image positions", image),
        ("text positions", len(rows.image) - image),
        ("dimensions", rows.values.shape[2]),
        ("left out as massive", len(every.image) - len(rows.image)),
    ]
    found: list[Panel] = [Facts(facts)]
    if any(rows.left_out):
        left, other = rows.left_out
        found.append(
            Note(f"{left} image and {other} text positions between those taken at even distances are left out.")
        )
    return found


def _warnings(asked: Asked, every: PositionRows, values: Mapping[str, Any]) -> list[Panel]:
    """Positions so large that they alone decide on directions and means."""
    times = every.massive()
    large = (times > MASSIVE).nonzero()[:, 0]
    if values["ordinary"] or not len(large):
        return []
    best = large[times[large].argsort(descending=True)][:MOST_TOLD]
    named = ", ".join(
        f"position {int(every.position[n])} ({'image' if every.image[n] else repr(word)}) {float(times[n]):.0f} times"
        for n, word in zip(best.tolist(), position_words(asked, every.position[best]), strict=True)
    )
    more = f" and {len(large) - len(best)} more" if len(large) > len(best) else ""
    return [Note(f"Of massive norm: {named} the median{more}. They may rule directions and means.", "warning")]


def _told(rows: PositionRows, measure: str) -> list[Panel]:
    return [Note(" ".join(told))] if (told := why_not(rows, measure)) else []


def _curves(rows: PositionRows, found: Mapping[str, Tensor], values: Mapping[str, Any]) -> Picture:
    empty = [float("nan")] * len(rows.layers)
    lines = [Curve(name, "", rows.layers, line.tolist(), empty, empty) for name, line in found.items()]
    return Picture("layer by layer", as_picture(curves_figure(lines, TITLES[values["measure"]])))


def _map(asked: Asked, rows: PositionRows, placed: Tensor, shares: Tensor, values: Mapping[str, Any]) -> Picture:
    words = [word.strip() for word in position_words(asked, rows.position)]
    labels = ["" if image else word for word, image in zip(words, rows.image.tolist(), strict=True)]
    title = f"{POINTS[values['point']]}, layer {values['layer']}{', directions' if values['unit'] else ''}"
    figure = map_figure(placed, rows.image, labels, shares, title)
    return Picture("positions along their first two principal directions", as_picture(figure))


def _table(rows: PositionRows, found: Mapping[str, Tensor], values: Mapping[str, Any]) -> Table:
    columns = [["" if math.isnan(value) else value for value in line.tolist()] for line in found.values()]
    lines = [(layer, *numbers) for layer, *numbers in zip(rows.layers, *columns, strict=True)]
    picks = [{"layer": layer} for layer in rows.layers]
    return Table(("layer", *found), lines, f"{TITLES[values['measure']].capitalize()}; a click maps the layer", picks)


def _python(values: Mapping[str, Any]) -> str:
    ordinary = ".ordinary()" if values["ordinary"] else ""
    at = f"mapped.at({values['layer']})"
    return "\n".join(
        [
            *(["from analyses.anisotropy import unit"] if values["unit"] else []),
            "from analyses.position_geometry import measured, position_rows",
            "from analyses.position_map import principal_map",
            "",
            f"rows = position_rows(model, batch, {values['point']!r}){ordinary}",
            f"mapped = rows.of({values['on_map']!r})",
            f"placed, shares = principal_map({f'unit({at})' if values['unit'] else at})",
            f"found = measured(rows, {values['measure']!r})",
            'of_map = {"map_positions": mapped.position, "map": placed, "map_shares": shares}',
            'arrays = {**found, "positions": rows.position, **of_map}',
        ]
    )


def make_tab(folders: Sequence[Path] = ()) -> tab.Tab:
    """The tab; it opens no folders."""
    return GeometryTab()
