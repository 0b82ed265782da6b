"""The map of positions, against singular vectors by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analyses.curves import COLOURS
from analyses.position_map import MOST_LABELS, map_figure, principal_map
from hooked_mm.errors import BadInputError


@pytest.mark.parametrize("shape", [(40, 6), (5, 30)])
def test_coordinates_are_those_of_the_first_two_singular_vectors(shape: tuple[int, int]) -> None:
    """But for signs; shares of variance beside them."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 5
    placed, shares = principal_map(rows)
    wide = rows.double().numpy()
    wide = wide - wide.mean(0)
    left, sizes, _ = np.linalg.svd(wide, full_matrices=False)
    np.testing.assert_allclose(np.abs(placed.numpy()), np.abs(left[:, :2] * sizes[:2]), atol=1e-9)
    np.testing.assert_allclose(shares.numpy(), sizes[:2] ** 2 / (sizes**2).sum(), atol=1e-12)
    again, _ = principal_map(rows)
    assert torch.equal(placed, again)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (torch.ones(2, 4), "three rows"),
        (torch.ones(5, 4), "the same"),
        (torch.tensor([[1.0, 2], [3, 4], [float("inf"), 5]]), "not finite"),
    ],
)
def test_rows_without_a_plane(rows: torch.Tensor, why: str) -> None:
    """Refused, with the reason."""
    with pytest.raises(BadInputError, match=why):
        principal_map(rows)


def test_marks_are_coloured_by_modality_and_words_are_text() -> None:
    """No label is read as a formula; of many only the first are written; images have none."""
    count = MOST_LABELS + 20
    placed = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = torch.arange(count) < 10
    labels = ["" if n < 10 else "$\\frac{" if n == 10 else f"word{n}" for n in range(count)]
    figure = map_figure(placed, image, labels, torch.tensor([0.5, 0.25]), "layer $3")
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == labels[10 : 10 + MOST_LABELS]
    assert axes.get_xlabel() == "first direction: 50.0% of variance"
    drawn = {marks.get_label(): marks for marks in axes.collections}
    np.testing.assert_allclose(np.asarray(drawn["image"].get_offsets()), placed[:10])
    np.testing.assert_allclose(np.asarray(drawn["text"].get_offsets()), placed[10:])
    assert COLOURS["image"] != COLOURS["text"]
    with pytest.raises(BadInputError, match="give one each"):
        map_figure(placed, image, labels[1:], torch.tensor([0.5, 0.25]))


def test_labels_are_not_written_over_each_other() -> None:
    """Of two at one place the first; one that stands apart as well."""
    placed = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
    figure = map_figure(placed, torch.zeros(3, dtype=torch.bool), ["one", "two", "three"], torch.ones(2))
    assert [text.get_visible() for text in figure.axes[0].texts] == [True, False, True]
