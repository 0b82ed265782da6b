"""The one style in which analyses are drawn: layers on x, a line per modality, bootstrap bands, dashes for models.

Figures are objects of their own: nothing here touches pyplot's global state, and no display is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

COLOURS = {"all": "#4a4f57", "text": "#2f6fde", "image": "#d9822b"}
"""Told apart by the colour-blind, and in grey by the marks."""

OTHERS = ("#2a9d5c", "#9b5de5", "#c2185b", "#00838f", "#8d6e63")
MARKS = {"all": "o", "text": "s", "image": "^"}
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        modality: Its colour and mark; another word than a modality's gets a colour of its own.
        model: Its dashes.
        layers: x.
        values: y.
        low, high: The band; NaN where there is none.
    """

    modality: str
    model: str
    layers: Sequence[int]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> list[Line2D]:
    """Curves over layers into axes that are there.

    Args:
        axes: Theirs.
        curves: At least one; those of one model and modality are one line.

    Returns:
        What the legend shows: a handle per modality; if there are several, also one per model.
    """
    models = list(dict.fromkeys(curve.model for curve in curves))
    names = list(dict.fromkeys(curve.modality for curve in curves))
    further = iter(OTHERS * len(names))
    colours = {name: COLOURS.get(name) or next(further) for name in names}
    for curve in curves:
        colour, number = colours[curve.modality], models.index(curve.model)
        low, high = np.asarray(curve.low, float), np.asarray(curve.high, float)
        axes.plot(
            curve.layers,
            curve.values,
            color=colour,
            linestyle=DASHES[number % len(DASHES)],
            marker=MARKS.get(curve.modality, "D"),
            markersize=4.5,
            markerfacecolor=colour if not number else "white",
            linewidth=1.6,
        )
        if np.isfinite(low).any():
            axes.fill_between(curve.layers, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=colours[name], marker=MARKS.get(name, "D"), markersize=4.5, label=name) for name in names
    ]
    if len(models) > 1:
        for number, model in enumerate(models):
            dashes: Any = DASHES[number % len(DASHES)]
            handles.append(Line2D([], [], color=COLOURS["all"], linestyle=dashes, label=model))
    return handles


def curves_figure(curves: Sequence[Curve], title: str) -> Figure:
    """Curves over layers, a legend below.

    Args:
        curves: See `draw_curves`.
        title: The score's name.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    handles = draw_curves(axes, curves)
    axes.set_xlabel("layer")
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    if len({curve.model for curve in curves}) == 1:
        axes.set_title(curves[0].model, fontsize=9, loc="right", color="#8a8f98", parse_math=False)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=9)
    return figure
