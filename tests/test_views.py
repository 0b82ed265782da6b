"""Values of grids and windows are shown row by row, and go back to where they were."""

from __future__ import annotations

import pytest
import torch

from hooked_mm.views import PLAIN, Fused, Heads, OnGrid, Pass, View

RUN = Pass(lambda path: None, 1)


@pytest.mark.parametrize(
    ("view", "shape"),
    [(PLAIN, (2, 12, 24)), (Heads(4), (2, 12, 4, 6)), (Fused(1, 2, 2), (2, 12, 2, 4))],
)
def test_a_grid_is_shown_row_by_row(view: View, shape: tuple[int, ...]) -> None:
    """(n, rows, cols, d): the place in row 1, column 2 of 3 x 4 is the seventh."""
    whole = torch.randn(2, 3, 4, 24)
    shown = OnGrid(view).show(whole, RUN)
    assert tuple(shown.shape) == shape
    assert torch.equal(shown[:, 6], view.show(whole[:, 1, 2], RUN))
    new = torch.randn(shape)
    back = OnGrid(view).back(new, whole)
    assert back.shape == whole.shape
    assert torch.equal(OnGrid(view).show(back, RUN), new)


def test_what_lies_in_no_grid_is_as_it_was() -> None:
    """(n, p, d) is the view's own."""
    whole = torch.randn(2, 5, 8)
    assert torch.equal(OnGrid(Heads(2)).show(whole, RUN), Heads(2).show(whole, RUN))
    new = torch.randn(2, 5, 2, 4)
    assert torch.equal(OnGrid(Heads(2)).back(new, whole), Heads(2).back(new, whole))
