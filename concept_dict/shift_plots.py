"""The plots of arXiv 2501.03012: recovery before and after the shift, and what it goes with.

Figures are objects of their own: nothing here touches pyplot's global state, and no display is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from concept_dict.gains import Correlation, counted, gain
from concept_dict.recovery import SCORES
from concept_dict.shift_study import ShiftStudy
from concept_dict.shift_tables import concept_names, form_values, known_scores
from hooked_mm.errors import unknown

BEFORE, AFTER, REFITTED, FEW = "#8a8f98", "#2f6fde", "#d9822b", "white"
LONGEST = 28
"""Characters of a concept's name beside a plot."""


def recovery_figure(
    study: ShiftStudy,
    scores: Sequence[str] = ("cosine", "words"),
    names: Sequence[str] | None = None,
) -> Figure:
    """Per concept a score before and after the shift, joined by a line, beside `refitted`; the largest gain on top.

    Concepts without a partner have no scores and are left out; those with too few rows to count have hollow marks.

    Args:
        study: Whose concepts.
        scores: A panel each; those that were not computed are left out.
        names: What to call each concept beside its label, such as its words.

    Raises:
        BadInputError: For a score that there is not, or if there is not one name per concept.
    """
    for score in scores:
        if score not in SCORES:
            raise unknown("score", score, SCORES)
    labels = [_short(name) for name in concept_names(study, names)]
    shown = [score for score in scores if score in known_scores(study)]
    height = 1.6 + 0.24 * max(1, int((study.recovery.partner >= 0).sum()))
    figure = Figure(figsize=(5.6 * max(1, len(shown)), height), layout="constrained")
    for score, axes in zip(shown, figure.subplots(1, max(1, len(shown)), squeeze=False)[0], strict=False):
        _recovery(axes, study, score, labels, counted(study.recovery, study.settings.enough))
    if shown:
        handles, told = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, told, loc="outside lower center", ncols=len(told), frameon=False, fontsize=9)
    return figure


def _recovery(axes: Axes, study: ShiftStudy, score: str, labels: Sequence[str], kept: Bool[np.ndarray, " k"]) -> None:
    """One panel of `recovery_figure`."""
    before, after = (form_values(study, score, form) for form in ("unshifted", "shifted"))
    refitted, gained = form_values(study, score, "refitted"), gain(study.recovery, score)
    there = np.flatnonzero(np.isfinite(gained))
    order = there[np.argsort(gained[there], kind="stable")]
    place = np.arange(len(order))
    axes.hlines(place, before[order], after[order], color="#c9ccd1", linewidth=2, zorder=1)
    axes.plot(refitted[order], place, "|", color=REFITTED, markersize=11, markeredgewidth=2, label="refitted")
    # The one below is larger, so that both show where nothing is gained.
    for values, colour, name, size in ((before, BEFORE, "unshifted", 84), (after, AFTER, "shifted", 34)):
        inside = np.where(kept[order], colour, FEW).tolist()
        axes.scatter(values[order], place, s=size, c=inside, edgecolors=colour, linewidths=1.4, zorder=3)
        # An empty series of its own: in the legend marks are full, whatever the first concept's are.
        axes.scatter([], [], s=size, color=colour, label=name)
    if not kept[order].all():
        axes.scatter([], [], s=34, color=FEW, edgecolors=AFTER, linewidths=1.4, label="hollow: too few rows to count")
    axes.set_yticks(place, [labels[number] for number in order], fontsize=8, parse_math=False)
    axes.set_ylim(-0.7, max(len(order), 1) - 0.3)
    axes.set_title(f"{score}: better for {(gained > 0).sum()}, worse for {(gained < 0).sum()} of {len(there)} concepts")
    axes.set_xlabel(f"{score} {'(lower is better)' if score == 'distance' else ''}".rstrip())
    axes.grid(axis="x", color="#e6e8eb", zorder=0)
    _plain(axes)


def correlation_figure(study: ShiftStudy) -> Figure:
    """Consistency and magnitude of the shifts against what they gain in cosine, a point per concept.

    Areas go with the rows of a concept's shift; those with too few to count are hollow and have no part in the
    correlations.
    """
    figure = Figure(figsize=(11.2, 4.8), layout="constrained")
    measured = {"consistency": study.shifts.pairwise.numpy(), "magnitude": study.shifts.magnitude.numpy()}
    told = {"consistency": "consistency (mean cosine of two rows' shifts)", "magnitude": "magnitude ||Δ||"}
    gained, kept = gain(study.recovery, "cosine"), counted(study.recovery, study.settings.enough)
    counts = study.recovery.counts
    for (name, values), axes in zip(measured.items(), figure.subplots(1, 2), strict=True):
        there = np.isfinite(values) & np.isfinite(gained)
        sizes = 24 + 320 * counts / max(1, counts.max())
        axes.axhline(0, color="#c9ccd1", linewidth=1, zorder=0)
        inside = np.where(kept, AFTER, FEW)[there].tolist()
        # Large ones first, so that none hides another.
        order = np.argsort(-sizes[there], kind="stable")
        points = axes.scatter(
            values[there][order],
            gained[there][order],
            s=sizes[there][order],
            c=[inside[index] for index in order],
            edgecolors=AFTER,
            linewidths=1.2,
        )
        points.set_alpha(0.75)
        middle = (values[there].min() + values[there].max()) / 2 if there.any() else 0
        for number in np.flatnonzero(there):
            # Inwards, so that names of points at the edge stay within the plot.
            right = values[number] > middle
            away = np.sqrt(sizes[number]) / 2 + 3
            axes.annotate(
                study.label(int(number)),
                (values[number], gained[number]),
                xytext=(-away if right else away, 0),
                textcoords="offset points",
                ha="right" if right else "left",
                va="center",
                fontsize=7.5,
                parse_math=False,
            )
        axes.margins(x=0.08, y=0.14)
        axes.set_title(correlation_text(study.correlations[f"{name} with gain in cosine"]), fontsize=10)
        axes.set_xlabel(told[name])
        axes.set_ylabel("gain in cosine")
        _plain(axes)
    return figure


def correlation_text(found: Correlation) -> str:
    """Pearson's r with its 95 % interval, Spearman's rho, and over how many concepts."""
    if np.isnan(found.pearson):
        return f"no correlation: {found.concepts} concepts, or nothing varies"
    interval = f"[{found.low:.2f}, {found.high:.2f}]"
    return f"r = {found.pearson:.2f} {interval}, ρ = {found.spearman:.2f}, {found.concepts} concepts"


def figure_image(figure: Figure, dpi: int = 110) -> Image.Image:
    """The figure as a picture."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: Float[np.ndarray, "h w 4"] = np.asarray(canvas.buffer_rgba())
    return Image.fromarray(pixels).convert("RGB")


def _short(name: str) -> str:
    """One line that leaves room for the plot."""
    line = " ".join(name.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1].rstrip(" ,") + "…"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color="#c9ccd1")
