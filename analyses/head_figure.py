"""Heads x layers as a picture: a panel per thing that heads attend to, layers from below to above."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from torch import Tensor

from hooked_mm.errors import BadInputError

# The colours of maps over pictures (`hooked_mm.drawing.heat`) on white; the brightest end is made dark, as it is on
# paper that strength must show.
COLOURS = LinearSegmentedColormap.from_list("heads", ["#ffffff", "#ffe13c", "#f08a1e", "#c82800", "#5a1000"])
LACKING = "#d5d9dd"


def head_figure(
    panels: Sequence[tuple[str, Float[Tensor, "layers heads"]]],
    layers: Sequence[int],
    heads: Sequence[int],
    *,
    common: bool = False,
    title: str = "",
) -> Figure:
    """Values of every head of every layer, panels side by side.

    Args:
        panels: A title and values each, from zero on; NaN is drawn grey.
        layers: Their numbers.
        heads: Their numbers.
        common: All panels in the scale of the largest value of all; each in its own unless told.
        title: Above all.

    Raises:
        BadInputError: If there is no panel, or one has not a value per layer and head.
    """
    shape = (len(layers), len(heads))
    if not panels or any(tuple(values.shape) != shape for _, values in panels):
        raise BadInputError(
            f"panels of {[tuple(v.shape) for _, v in panels]} for {shape} layers and heads; give one each"
        )
    shown = [values.detach().double().cpu().numpy() for _, values in panels]
    peaks = [float(np.nanmax(values)) if np.isfinite(values).any() else 0.0 for values in shown]
    width = min(6.0, max(2.8, 0.28 * len(heads) + 1.4))
    figure = Figure(figsize=(width * len(panels), min(9.0, max(2.4, 0.22 * len(layers) + 1.2))), layout="constrained")
    for place, (name, _) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        axes.set_facecolor(LACKING)
        peak = max(peaks) if common else peaks[place]
        values = np.ma.masked_invalid(shown[place])
        drawn = axes.imshow(values, cmap=COLOURS, vmin=0, vmax=peak or 1.0, aspect="auto", origin="lower")
        for axis, numbers in ((axes.xaxis, heads), (axes.yaxis, layers)):
            axis.set_major_locator(MaxNLocator(min(len(numbers), 10), integer=True, steps=[1, 2, 4, 5, 10]))
            axis.set_major_formatter(FuncFormatter(partial(_number, numbers)))
        axes.set_xlabel("head")
        axes.set_ylabel("layer" if not place else "")
        axes.set_title(name, fontsize=10, loc="left", parse_math=False)
        figure.colorbar(drawn, ax=axes, format="%.3g")
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", parse_math=False)
    return figure


def _number(numbers: Sequence[int], at: float, _: int | None = None) -> str:
    return str(numbers[int(at)]) if 0 <= at < len(numbers) else ""


def as_picture(figure: Figure, dpi: int = 90) -> Image.Image:
    """A figure as a picture, for a gallery."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, dpi=dpi, format="png")
    return Image.open(buffer).convert("RGB")
