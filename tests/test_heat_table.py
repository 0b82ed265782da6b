"""Tables as heat: every known number is in its cell, coloured around zero."""

from __future__ import annotations

import numpy as np
import pytest

from analyses.heat_table import heat_figure
from hooked_mm.errors import BadInputError


def test_every_number_is_written_and_zero_is_white() -> None:
    """Names at both sides; what is not known stays empty; a dollar sign is no formula."""
    values = np.array([[0.0, 1.0, np.nan], [-0.5, 0.25, -2.0]])
    figure = heat_figure(values, ["0", "1"], ["object", "$last", "x"], "recovery $")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.00", "1.00", "-0.50", "0.25", "-2.00"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["object", "$last", "x"]
    image = axes.images[0]
    assert image.get_clim() == (-2.0, 2.0)
    assert np.allclose(image.cmap(image.norm(0.0))[:3], 0.97, atol=0.03)
    assert heat_figure(values, ["0", "1"], ["a", "b", "c"], "", peak=1.0).axes[0].images[0].get_clim() == (-1.0, 1.0)
    assert heat_figure(values * 0, ["0", "1"], ["a", "b", "c"], "").axes[0].images[0].get_clim() == (-1.0, 1.0)


def test_names_that_do_not_fit_are_refused() -> None:
    """With the shape."""
    with pytest.raises(BadInputError, match=r"\(1, 2\) for 1 rows and 1 columns"):
        heat_figure(np.zeros((1, 2)), ["0"], ["a"], "")
    with pytest.raises(BadInputError, match="for 0 rows"):
        heat_figure(np.zeros((0, 0)), [], [], "")
