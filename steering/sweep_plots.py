"""A sweep drawn: effect against damage, both against alpha, and effect over layers and alphas.

Layers have colours from dark to bright (viridis: the order shows to the colour-blind and in grey too), vectors have
marks, controls are grey. Figures are objects of their own: nothing here touches pyplot's global state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from steering.sweep_result import Row, SweepResult, number, steered, unsteered
from steering.sweep_tables import DETAILS, chosen_settings, controls_for, shown_split, where_name

GREY, DARK, RING, GOAL, LINE = "#8a8f98", "#3a3f47", "#d9822b", "#2a9d5c", "#c9ccd1"
MARKS = "osD^vPXp"
CONTROL_MARKS = {"random": "x", "shuffled": "o"}
CONTROL_LINES = {"random": "--", "shuffled": ":"}
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
FAR = 5
"""So many times the goal is far beyond it."""
MOST = 6
"""Vectors that have panels of their own: those with the largest effects."""
LONGEST = 34
"""Characters of a vector's name in a plot."""

JOINED = ("vector", "control", "hook", "layer", *DETAILS)
"""What settings on one line share."""


def most_settings(result: SweepResult) -> str:
    """The split on which most settings were evaluated; `test` if both have as many."""
    return max(reversed(result.splits()), key=lambda split: len(result.of(split)))


def tradeoff_figure(result: SweepResult, split: str | None = None) -> Figure | None:
    """Effect against damage: a point per setting, the Pareto front as a line, the chosen ringed, the goal shaded.

    The scale of damage is linear up to the goal and logarithmic beyond it where some settings lie far beyond: the
    region that matters would be a sliver otherwise. Intervals are drawn on the front.

    Args:
        result: The sweep.
        split: Which; the last of those that settings were evaluated on unless given.

    Returns:
        The figure, or None if no setting has both numbers.

    Raises:
        BadInputError: If nothing was evaluated on the split.
    """
    rows = [row for row in result.of(split or shown_split(result)) if _both(row)]
    mine = steered(rows)
    if not mine:
        return None
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    axes = figure.subplots()
    where, colours = where_name(rows), _colours(rows)
    # Of more vectors than there are marks only their kinds can be told apart.
    name = "vector" if len(_vectors(mine)) <= len(MARKS) else "kind"
    marks = _marks(row[name] for row in mine)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in mine:
        groups.setdefault((where(row), row[name]), []).append(row)
    for control, mark in CONTROL_MARKS.items():
        points = [row for row in steered(rows, control=True) if row["control"] == control]
        if points:
            told = f"control: {control}"
            # A cross has no inside; a circle's is left empty.
            paint: dict[str, Any] = {"color": GREY} if mark == "x" else {"facecolors": "none", "edgecolors": GREY}
            axes.scatter(*_points(points), marker=mark, s=34, linewidths=1.1, label=told, zorder=2, **paint)
    for (layer, own), points in groups.items():
        style: dict[str, Any] = {"marker": marks[own], "c": colours[layer], "edgecolors": "white", "linewidths": 0.6}
        axes.scatter(*_points(points), s=46, zorder=4, **style)
    bare = [row for row in rows if unsteered(row)]
    if bare:
        axes.scatter(*_points(bare), marker="*", s=150, c=DARK, label="unsteered", zorder=5)
    front = sorted((row for row in mine if row.get("front")), key=lambda row: (row["damage"], row["effect"]))
    if front:
        x, y = _points(front)
        axes.plot(x, y, color=DARK, linewidth=1.2, drawstyle="steps-post", label="Pareto front", zorder=3)
        axes.errorbar(
            x,
            y,
            xerr=_errors(front, "damage"),
            yerr=_errors(front, "effect"),
            fmt="none",
            ecolor=LINE,
            elinewidth=0.9,
            zorder=1,
        )
    picked = chosen_settings(result)
    chosen = [row for row in mine if row["setting"] in picked]
    if chosen:
        axes.scatter(
            *_points(chosen), s=210, facecolors="none", edgecolors=RING, linewidths=2.2, label="chosen", zorder=6
        )
    told = _damage_scale(axes, "x", rows, result.goal("damage"))
    axes.set_xlabel(f"damage (%){told}")
    _shade(axes, result)
    for layer, colour in colours.items():
        axes.scatter([], [], s=60, marker="s", color=colour, label=layer)
    if len(marks) > 1:
        for own, mark in marks.items():
            axes.scatter([], [], s=46, marker=mark, color=DARK, label=_short(own))
    axes.set_ylabel("effect (%)")
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    _plain(axes)
    _legend(figure, [axes])
    return figure


def alpha_figure(result: SweepResult, split: str | None = None) -> Figure | None:
    """Effect and damage against alpha, a row of panels per vector: a line per layer, controls dashed.

    Upright strokes are 95 % intervals. Of more than `MOST` vectors those with the largest effects are drawn.

    Args:
        result: The sweep.
        split: Which; the one with most settings unless given.

    Returns:
        The figure, or None if no setting has a number.

    Raises:
        BadInputError: If nothing was evaluated on the split.
    """
    rows = result.of(split or most_settings(result))
    scores = [s for s in ("effect", "damage") if any(math.isfinite(number(row, s)) for row in steered(rows))]
    vectors = _strongest(rows)
    if not scores:
        return None
    figure = Figure(figsize=(5.4 * len(scores) + 1.6, 3.3 * len(vectors) + 0.5), layout="constrained")
    panels = figure.subplots(len(vectors), len(scores), squeeze=False, sharex=True, sharey="col")
    where, colours, ways = where_name(rows), _colours(rows), _marks(_way(row) for row in steered(rows))
    picked = chosen_settings(result)
    for vector, line in zip(vectors, panels, strict=True):
        for score, axes in zip(scores, line, strict=True):
            for found in _series(controls_for(vector, rows)):
                control = found[0]["control"]
                style = CONTROL_LINES.get(control, "-.")
                _draw(axes, found, score, GREY, style, None, f"control: {control}")
            for found in _series([row for row in steered(rows) if row["vector"] == vector]):
                layer, mark = where(found[0]), ways[_way(found[0])]
                _draw(axes, found, score, colours[layer], "-", mark, layer)
            for row in rows:
                if unsteered(row) and math.isfinite(number(row, score)):
                    axes.axhline(row[score], color=DARK, linewidth=1, dashes=(6, 2, 1, 2), label="unsteered")
            if math.isfinite(goal := result.goal(score)):
                axes.axhline(goal, color=GOAL, linewidth=1.4, alpha=0.8, label="goal")
            own = [row for row in steered(rows) if row["vector"] == vector and row["setting"] in picked]
            points = [(row["alpha"], row[score]) for row in own if math.isfinite(number(row, score))]
            if points:
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, s=190, facecolors="none", edgecolors=RING, linewidths=2.2, label="chosen", zorder=6)
            _alpha_axis(axes, [row["alpha"] for row in rows if not unsteered(row)])
            axes.set_title(_short(vector) if len(vectors) > 1 else "", fontsize=10, parse_math=False)
            told = _damage_scale(axes, "y", rows, result.goal("damage")) if score == "damage" else ""
            if score == "effect":
                axes.yaxis.set_major_formatter(FuncFormatter(_percent))
            axes.set_ylabel(f"{score} (%){told}")
            _plain(axes)
    for axes in panels[-1]:
        axes.set_xlabel("alpha")
    if len(ways) > 1:
        for way, mark in ways.items():
            panels[0, 0].plot([], [], color=DARK, marker=mark, label=way or "as it comes")
    _legend(figure, panels.ravel().tolist())
    return figure


def layer_figure(result: SweepResult, split: str | None = None) -> Figure | None:
    """Effect over layers and alphas, a panel per vector (the best of positions, operations and gates); `✓`: goal met.

    Of more than `MOST` vectors those with the largest effects are drawn.

    Args:
        result: The sweep.
        split: Which; the one with most settings unless given.

    Returns:
        The figure, or None unless there are several layers and several alphas.

    Raises:
        BadInputError: If nothing was evaluated on the split.
    """
    rows = result.of(split or most_settings(result))
    mine = [row for row in steered(rows) if math.isfinite(number(row, "effect"))]
    where, picked = where_name(rows), chosen_settings(result)
    there = {where(row) for row in mine}
    layers = [layer for layer in _colours(rows) if layer in there]
    alphas = sorted({float(row["alpha"]) for row in mine})
    if len(layers) < 2 or len(alphas) < 2:
        return None
    vectors, columns = _strongest(mine), min(2, len(_strongest(mine)))
    lines = -(-len(vectors) // columns)
    size = (max(4.4, 0.52 * len(alphas) + 1.4) * columns + 1, max(1.8, 0.36 * len(layers) + 1.1) * lines)
    figure = Figure(figsize=size, layout="constrained")
    values = [number(row, "effect") for row in mine]
    low, high = min(0.0, *values), max(1.0, *values)
    panels = figure.subplots(lines, columns, squeeze=False)
    shown = panels.ravel()[: len(vectors)]
    for vector, axes in zip(vectors, shown, strict=True):
        grid = np.full((len(layers), len(alphas)), np.nan)
        best: dict[tuple[int, int], Row] = {}
        # The best comes last and stays.
        for row in sorted(mine, key=lambda row: (bool(row.get("goal_met")), row["effect"])):
            if row["vector"] == vector:
                cell = layers.index(where(row)), alphas.index(float(row["alpha"]))
                best[cell], grid[cell] = row, row["effect"]
        image = axes.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto", origin="lower")
        for (line, column), row in sorted(best.items(), key=lambda item: item[0]):
            bright = (row["effect"] - low) / (high - low) > 0.5
            told = f"{100 * row['effect']:z.0f}" + ("✓" if row.get("goal_met") else "")
            colour = "black" if bright else "white"
            axes.text(column, line, told, ha="center", va="center", fontsize=8, color=colour)
            if row["setting"] in picked:
                corner = (column - 0.46, line - 0.46)
                axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=RING, linewidth=2.6, zorder=3))
        axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas], fontsize=8)
        axes.set_yticks(range(len(layers)), layers, fontsize=8)
        axes.set_xlabel("alpha")
        axes.set_title(_short(vector), fontsize=10, parse_math=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    for axes in panels.ravel()[len(vectors) :]:
        axes.set_axis_off()
    figure.colorbar(
        image, ax=panels, format=FuncFormatter(_percent), label="effect (%)", shrink=0.9, aspect=24, fraction=0.05
    )
    return figure


def figures(result: SweepResult) -> list[tuple[str, Figure]]:
    """What there is to draw, with captions that say of which split."""
    if not result.rows:
        return []
    split = most_settings(result)
    left_out = len(_vectors(steered(result.of(split)))) - MOST
    some = f", the {MOST} vectors of {left_out + MOST} with the largest effects" if left_out > 0 else ""
    drawn = [
        (f"Effect against damage, {shown_split(result)}", tradeoff_figure(result)),
        (f"Effect and damage against alpha, {split}{some}", alpha_figure(result, split)),
        (f"Effect by layer and alpha, {split}{some} (✓: goal met)", layer_figure(result, split)),
    ]
    return [(caption, figure) for caption, figure in drawn if figure is not None]


def _both(row: Row) -> bool:
    return math.isfinite(number(row, "effect")) and math.isfinite(number(row, "damage"))


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [number(row, "damage") for row in rows], [number(row, "effect") for row in rows]


def _errors(rows: Sequence[Row], score: str) -> np.ndarray:
    """How far intervals reach below and above; nothing where there is none."""
    middle = np.array([number(row, score) for row in rows])
    low, high = (np.array([number(row, f"{score}_{end}") for row in rows]) for end in ("low", "high"))
    return np.nan_to_num(np.stack([middle - low, high - middle])).clip(0)


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour per layer (or hook), in their order."""
    mine = [row for row in rows if not unsteered(row)]
    order = sorted(mine, key=lambda row: (row["layer"] is None, row["layer"] or 0, str(row["hook"])))
    where = where_name(rows)
    names = list(dict.fromkeys(where(row) for row in order))
    # Not to the end: yellow on white does not show.
    shades = colormaps["viridis"](np.linspace(0.05, 0.85, max(2, len(names))))
    return {name: to_hex(shade) for name, shade in zip(names, shades, strict=False)}


def _marks(names: Iterable[str]) -> dict[str, str]:
    return {name: MARKS[place % len(MARKS)] for place, name in enumerate(dict.fromkeys(names))}


def _way(row: Row) -> str:
    return ", ".join(str(row[name]) for name in DETAILS if row[name])


def _vectors(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["vector"] for row in rows))


def _strongest(rows: Sequence[Row]) -> list[str]:
    """The vectors to draw, in their own order."""
    best: dict[str, float] = {}
    for row in steered(rows):
        effect = number(row, "effect")
        best[row["vector"]] = max(best.get(row["vector"], -math.inf), -math.inf if math.isnan(effect) else effect)
    kept = sorted(best, key=lambda name: -best[name])[:MOST]
    return [name for name in best if name in kept]


def _series(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that one line joins: alike but for alpha, by which they are sorted."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: float(row["alpha"])):
        found.setdefault(tuple(row[name] for name in JOINED), []).append(row)
    return list(found.values())


def _draw(axes: Axes, rows: Sequence[Row], score: str, colour: str, style: str, mark: str | None, label: str) -> None:
    """A line with its intervals: upright strokes, since bands of many lines would cover each other."""
    alphas, values = ([float(row["alpha"]) for row in rows], [number(row, score) for row in rows])
    front = 2 if mark is None else 3
    axes.plot(
        alphas, values, style, color=colour, marker=mark, markersize=4.5, linewidth=1.6, label=label, zorder=front
    )
    strokes = axes.errorbar(alphas, values, _errors(rows, score), fmt="none", ecolor=colour, elinewidth=1.6, zorder=1)
    strokes[2][0].set_alpha(0.4)


def _damage_scale(axes: Axes, name: Literal["x", "y"], rows: Sequence[Row], goal: float) -> str:
    """Percent; logarithmic beyond the goal if values lie far beyond it, which the text says that is returned."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    values = [value for row in rows if math.isfinite(value := number(row, "damage"))]
    if not (goal > 0 and max(values) > FAR * goal):
        axis.set_major_formatter(FuncFormatter(_percent))
        return ""
    set_scale, set_limits = (axes.set_xscale, axes.set_xlim) if name == "x" else (axes.set_yscale, axes.set_ylim)
    set_scale("symlog", linthresh=goal, linscale=1.0)
    # What lies below zero, where steering does good by chance, is shown as far as it reaches.
    least = min(-goal / 5, 1.2 * min(values))
    set_limits(least, 1.25 * max(values))
    beyond = [tick for tick in TICKS if tick > 1.2 * goal]
    axis.set_major_locator(FixedLocator([*([-goal] if least <= -goal else []), 0, goal / 2, goal, *beyond]))
    axis.set_minor_locator(NullLocator())
    # After the scale, which brings a formatter of its own.
    axis.set_major_formatter(FuncFormatter(_percent))
    return f", logarithmic beyond {100 * goal:g} %"


def _shade(axes: Axes, result: SweepResult) -> None:
    """The region of the goal, within what is shown."""
    effect, damage = result.goal("effect"), result.goal("damage")
    if not (math.isfinite(effect) and math.isfinite(damage)):
        return
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    high = max(high, effect + 0.08 * (effect - low))
    right = max(right, damage * 1.5)
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    region = Rectangle((left, effect), damage - left, high - effect, color=GOAL, alpha=0.16, linewidth=0, zorder=0)
    region.set_label("goal")
    axes.add_patch(region)


def _alpha_axis(axes: Axes, values: Iterable[float]) -> None:
    """Ticks at the alphas; logarithmic if they spread widely."""
    alphas = sorted({float(value) for value in values})
    sizes = sorted(abs(alpha) for alpha in alphas if alpha)
    if sizes and sizes[-1] / sizes[0] > 8:
        if alphas[0] > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=sizes[0])
    if len(alphas) <= 10:
        axes.xaxis.set_major_locator(FixedLocator(alphas))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Beside the panels, every name once."""
    once = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    legend = figure.legend(
        list(once.values()), list(once), loc="outside right upper", ncols=1 + len(once) // 22, frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:zg}" if abs(value) >= 5e-5 else "0"


def _short(name: str) -> str:
    line = " ".join(str(name).split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1].rstrip(" ,") + "…"


def _plain(axes: Axes) -> None:
    axes.grid(color="#e6e8eb", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=LINE)
