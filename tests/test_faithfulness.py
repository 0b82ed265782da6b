"""Scores of maps: against scikit-learn, planted maps and curves computed by hand; controls come out as they must."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from analyses.faithfulness import area, coarsened, deletion_and_insertion, from_centre, located, removed
from hooked_mm.errors import BadInputError

MASK = torch.zeros(24, 32, dtype=torch.bool)
MASK[3:10, 5:16] = True
OTHER = torch.zeros(24, 32, dtype=torch.bool)
OTHER[14:20, 20:30] = True


def test_scores_of_a_map_are_those_of_scikit_learn() -> None:
    pixels = torch.randn(24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + MASK
    found = located(pixels, MASK, OTHER)
    assert found.auroc == pytest.approx(roc_auc_score(MASK.flatten(), pixels.flatten()))
    either = MASK | OTHER
    assert found.among == pytest.approx(roc_auc_score(MASK[either], pixels[either]))
    best = np.sort(pixels.flatten().numpy())[-int(MASK.sum()) :].min()
    chosen = (pixels >= best).numpy()
    assert found.iou == pytest.approx((chosen & MASK.numpy()).sum() / (chosen | MASK.numpy()).sum())


def test_a_map_of_whatever_is_an_object_is_at_chance_among_objects() -> None:
    found = located((MASK | OTHER).double(), MASK, OTHER)
    assert found.auroc > 0.9
    assert found.among == 0.5
    assert np.isnan(located(MASK.double(), MASK).among)


def test_a_constant_map_gets_no_credit_for_where_its_pixels_stand() -> None:
    """Ties in reading order would choose the top of the picture, where the object is."""
    top = torch.zeros(24, 32, dtype=torch.bool)
    top[:6] = True
    assert located(torch.zeros(24, 32), top).auroc == 0.5
    assert located(torch.zeros(24, 32), top).iou < 0.25


@given(seed=st.integers(0, 1000), rows=st.integers(2, 7), cols=st.integers(2, 7))
def test_no_order_of_patches_beats_the_coarsened_object(seed: int, rows: int, cols: int) -> None:
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random((21, 30)) < 0.1) | (torch.arange(30) < rng.integers(1, 29))
    box = (-2.0, 1.0, 31.0, 20.0)
    best = coarsened(mask, (rows, cols), box, smooth=False)
    covered = ~best.isnan()
    down = ((np.arange(21) + 0.5 - 1) / 19 * rows).astype(int).clip(0, rows - 1)
    across = ((np.arange(30) + 0.5 + 2) / 33 * cols).astype(int).clip(0, cols - 1)
    for _ in range(3):
        other = torch.from_numpy(rng.random((rows, cols))[np.ix_(down, across)])
        assert located(torch.where(covered, other, torch.nan), mask).auroc <= located(best, mask).auroc + 1e-12


def test_an_object_of_whole_patches_is_found_whole() -> None:
    mask = torch.zeros(24, 32, dtype=torch.bool)
    mask[6:12, 8:16] = True
    assert located(coarsened(mask, (4, 4), (0, 0, 32, 24), smooth=False), mask).iou == 1.0


def test_pictures_lose_the_pixels_of_largest_value_first() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
    pixels = torch.rand(24, 32, generator=torch.Generator().manual_seed(0))
    none, some, every = removed(image, pixels, [0.0, 0.25, 1.0], colour=(1, 2, 3))
    assert np.array_equal(np.asarray(none), np.asarray(image))
    gone = (np.asarray(some) == (1, 2, 3)).all(-1)
    expected = (pixels > pixels.flatten().sort().values[int(0.75 * 768) - 1]).numpy()
    assert np.array_equal(gone, expected)
    assert (np.asarray(every) == (1, 2, 3)).all()
    (back,) = removed(image, pixels, [0.25], insert=True, colour=(1, 2, 3))
    assert np.array_equal((np.asarray(back) == (1, 2, 3)).all(-1), ~gone)
    with pytest.raises(BadInputError, match="for a picture"):
        removed(image, pixels[1:], [0.5])


def test_areas_of_a_planted_answer_are_those_by_hand() -> None:
    """The answer needs the object: its probability is the share of the object that can be seen."""
    whole = np.zeros((24, 32, 3), np.uint8)
    whole[MASK.numpy()] = 200

    def probability(images: Sequence[Image.Image]) -> Tensor:
        return torch.tensor([float((np.asarray(one)[MASK.numpy()] == 200).all(-1).mean()) for one in images])

    image, share = Image.fromarray(whole), int(MASK.sum()) / MASK.numel()
    shares = np.arange(11) / 10
    gone = np.minimum(1, np.round(shares * 768) / int(MASK.sum()))
    deletion, insertion = deletion_and_insertion(probability, image, MASK.double(), steps=10, batch_size=4)
    assert deletion == pytest.approx(np.trapezoid(1 - gone, shares))
    assert insertion == pytest.approx(np.trapezoid(gone, shares))
    assert share == pytest.approx(77 / 768)
    worst = deletion_and_insertion(probability, image, -MASK.double(), steps=10)
    assert worst[0] > 0.9 > 0.1 > worst[1]


def test_the_area_is_of_the_curve_over_its_width() -> None:
    assert area([0.0, 1.0, 2.0], torch.tensor([0.0, 1.0, 0.0])) == pytest.approx(0.5)


def test_the_centre_control_is_largest_in_the_middle() -> None:
    found = from_centre((5, 3))
    assert found.shape == (3, 5)
    assert int(found.argmax()) == 7
    assert torch.allclose(found, found.flip(0, 1))
