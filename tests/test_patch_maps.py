"""Maps on pixels against torch's own interpolation, scikit-learn's AUROC and masks made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score, roc_auc_score

from analyses.patch_maps import auroc, covers, iou, on_picture, pointing
from hooked_mm.errors import BadInputError


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6))
def test_a_smooth_map_is_torchs_bilinear_one(rows: int, cols: int, factor: int, seed: int) -> None:
    """On a box that is the whole picture, of any shape."""
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    size = (cols * factor + seed % 3, rows * factor + seed % 2)
    theirs = torch.nn.functional.interpolate(values[None, None], (size[1], size[0]), mode="bilinear")[0, 0]
    ours = on_picture(values, (0, 0, *size), size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_pixels_have_the_value_of_their_patch_and_none_outside_the_box() -> None:
    """A box that begins left of the picture and ends before its right and lower border."""
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = on_picture(values, (-2, 0, 2, 4), (4, 5), smooth=False)
    nan = float("nan")
    expected = [[2, 2, nan, nan]] * 2 + [[4, 4, nan, nan]] * 2 + [[nan] * 4]
    np.testing.assert_array_equal(found.numpy(), np.array(expected, float))


def test_a_missing_patch_stays_missing_and_spoils_no_neighbour() -> None:
    """NaN in its own pixels alone."""
    values = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    found = on_picture(values, (0, 0, 8, 8), (8, 8))
    assert found[:4, 4:].isnan().all()
    assert found.isnan().sum() == 16
    assert (found.nan_to_num(nan=1.0) == 1).all()


@pytest.mark.parametrize(("shape", "box"), [((2, 2, 3), (0, 0, 4, 4)), ((2, 2), (4, 0, 4, 4)), ((0, 2), (0, 0, 1, 1))])
def test_what_is_no_map_is_refused(shape: tuple[int, ...], box: Any) -> None:
    """With its shape and box."""
    with pytest.raises(BadInputError, match="a map of shape"):
        on_picture(torch.zeros(shape), box, (4, 4))


@given(st.integers(0, 10**6))
def test_scores_are_scikit_learns(seed: int) -> None:
    """IoU and AUROC, with ties."""
    rng = np.random.default_rng(seed)
    truth, chosen = rng.random((2, 6, 7)) > 0.6
    truth[0, 0], truth[0, 1] = True, False
    scores = rng.integers(0, 5, truth.shape).astype(float)
    assert auroc(torch.tensor(scores), torch.tensor(truth)) == pytest.approx(
        roc_auc_score(truth.ravel(), scores.ravel())
    )
    assert iou(torch.tensor(chosen), torch.tensor(truth)) == pytest.approx(jaccard_score(truth.ravel(), chosen.ravel()))


def test_pixels_that_no_patch_covers_are_guessed_outside() -> None:
    """NaN is the lowest score, also below negative ones; the largest value is looked for among the others."""
    values = torch.tensor([[float("nan"), -1.0], [-2.0, -3.0]])
    mask = torch.tensor([[True, False], [False, False]])
    assert auroc(values, mask) == 0
    assert auroc(values, ~mask) == 1
    assert pointing(values, mask) == 0
    assert pointing(values, torch.tensor([[False, True], [False, False]])) == 1


def test_ties_of_the_largest_value_count_by_their_share() -> None:
    """Two largest pixels, one on the object."""
    assert pointing(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[True, False], [True, True]])) == 0.5


def test_nothing_to_score_is_not_a_number() -> None:
    """No pixel chosen nor true; one kind only; no value."""
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert np.isnan(iou(nothing, nothing))
    assert np.isnan(auroc(torch.rand(4), torch.ones(4, dtype=torch.bool)))
    assert np.isnan(pointing(torch.full((2, 2), torch.nan), nothing))


def test_an_object_has_the_pixels_that_it_covers_for_more_than_half() -> None:
    """Anti-aliased masks are shares."""
    assert covers(np.array([[0.5, 0.51], [0.0, 1.0]])).tolist() == [[False, True], [False, True]]
