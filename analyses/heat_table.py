"""Tables as heat: layers down, groups (or heads) across, the number in every cell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from hooked_mm.errors import BadInputError

COLOURS = "PuOr_r"
"""White at zero, orange above, violet below: told apart by the colour-blind."""


def heat_figure(
    values: Float[np.ndarray, "rows cols"],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    peak: float | None = None,
    row_label: str = "layer",
) -> Figure:
    """A table of numbers, coloured around zero.

    Args:
        values: NaN stays empty.
        rows: Their names, the first on top.
        columns: Their names.
        title: What the numbers are.
        peak: The value of full colour; the largest size there is unless given.
        row_label: What rows are.

    Raises:
        BadInputError: If there is not a name per row and column, or nothing to draw.
    """
    if values.shape != (len(rows), len(columns)) or not values.size:
        raise BadInputError(f"values of shape {values.shape} for {len(rows)} rows and {len(columns)} columns")
    known = values[np.isfinite(values)]
    top = float(np.abs(known).max()) if peak is None and known.size else (peak or 1.0)
    longest = max(map(len, columns))
    figure = Figure(figsize=(1.6 + 0.85 * len(columns), 1.4 + 0.32 * len(rows) + 0.05 * longest), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(values, cmap=COLOURS, vmin=-(top or 1.0), vmax=top or 1.0, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", parse_math=False, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, parse_math=False, fontsize=9)
    axes.set_ylabel(row_label)
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = abs(value) > 0.6 * top
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "#222"
            )
    figure.colorbar(shown, ax=axes, shrink=0.8).outline.set_visible(False)
    return figure
