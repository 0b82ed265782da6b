"""Heads x layers: what is drawn is what was given, where it belongs, in the scale that is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from analyses.head_figure import as_picture, head_figure
from hooked_mm.errors import BadInputError

VALUES = torch.arange(6.0).reshape(2, 3) / 10


def _drawn(figure: Any) -> list[Any]:
    """The panels' matrices, without colour bars."""
    return [axes.images[0] for axes in figure.axes if axes.images]


def test_layers_go_up_heads_to_the_right_in_their_own_numbers() -> None:
    """The first layer is below; ticks say the model's numbers."""
    figure = head_figure([("image", VALUES)], [4, 7], [1, 2, 9], title="t")
    (drawn,) = _drawn(figure)
    assert drawn.origin == "lower"
    assert np.allclose(drawn.get_array(), VALUES)
    axes = drawn.axes
    assert [axes.yaxis.get_major_formatter()(at, None) for at in (0, 1, 2)] == ["4", "7", ""]
    assert [axes.xaxis.get_major_formatter()(at, None) for at in (0, 2)] == ["1", "9"]
    assert as_picture(figure).width > 200


def test_scales_are_each_panels_own_or_common() -> None:
    """The upper end is the largest value; zeros and NaN alone make a panel, too."""
    panels = [("a", VALUES), ("b", VALUES * 4), ("c", torch.zeros(2, 3)), ("d", torch.full((2, 3), torch.nan))]
    own = [drawn.get_clim() for drawn in _drawn(head_figure(panels, [0, 1], [0, 1, 2]))]
    assert own == [(0, 0.5), (0, 2), (0, 1), (0, 1)]
    common = [drawn.get_clim() for drawn in _drawn(head_figure(panels, [0, 1], [0, 1, 2], common=True))]
    assert common == [(0, 2)] * 4
    with pytest.raises(BadInputError, match=r"\[\(2, 3\)\] for \(3, 2\)"):
        head_figure([("a", VALUES)], [0, 1, 2], [0, 1])
