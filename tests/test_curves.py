"""Curves of an analysis: layers on x, a line per modality with its band, dashes for models, all in the legend."""

from __future__ import annotations

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex

from analyses.curves import COLOURS, Curve, curves_figure

NAN = [float("nan")] * 3


def test_what_is_drawn() -> None:
    """Values and bands as they are given; a curve without a band has none."""
    image = Curve("image", "base", [0, 1, 2], [0.1, 0.5, 0.2], [0.0, 0.4, 0.1], [0.2, 0.6, 0.3])
    text = Curve("text", "base", [0, 1, 2], [0.9, 0.8, 0.7], NAN, NAN)
    (axes,) = curves_figure([image, text], "a score of $5").axes
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines] == [
        ([0, 1, 2], [0.1, 0.5, 0.2]),
        ([0, 1, 2], [0.9, 0.8, 0.7]),
    ]
    assert [to_hex(line.get_color()) for line in axes.lines] == [COLOURS["image"], COLOURS["text"]]
    (band,) = (drawn for drawn in axes.collections if isinstance(drawn, PolyCollection))
    corners = band.get_paths()[0].vertices
    assert np.isclose(corners[:, 1].min(), 0.0)
    assert np.isclose(corners[:, 1].max(), 0.6)
    assert axes.get_title("left") == "a score of $5"
    assert axes.get_title("right") == "base"


def test_models_are_told_apart() -> None:
    """One colour per modality, one kind of dashes per model; both stand in the legend."""
    curves = [Curve(kind, model, [0, 1], [1, 2], NAN[:2], NAN[:2]) for kind in ("all", "odd") for model in ("a", "b")]
    figure = curves_figure(curves, "s")
    lines = figure.axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-", "--"]
    assert len({to_hex(line.get_color()) for line in lines}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all", "odd", "a", "b"]
