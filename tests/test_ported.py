"""Miniatures of what transformers lacks."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from hooked_mm.testing.miniatures import PORTED, miniature, miniature_inputs
from tests.miniature_checks import check_runs


@pytest.mark.parametrize("family", PORTED)
def test_runs(family: str) -> None:
    """It runs on pictures, sees them, and generates."""
    check_runs(family)


def test_they_are_those_that_transformers_lacks() -> None:
    """Once transformers has one, ours is not needed any more."""
    assert not set(PORTED) & set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def test_molmo_shows_all_that_is_peculiar() -> None:
    """Samples of different numbers of crops, padding crops, patches of padding, positions that several crops show."""
    inputs = miniature_inputs(miniature("molmo"), samples=3)
    where = inputs["image_input_idx"]
    used = (where >= 0).any(dim=-1).sum(dim=-1)
    assert used.tolist() == [2, 3, 4]
    assert (inputs["images"][0, 2:] == -1).all()
    assert {-1.0, 0.0, 0.5, 1.0} == set(inputs["image_masks"].unique().tolist())
    # The second crop of two gives its margin up.
    assert ((where[1, 2] < 0) & (where[1, 1] >= 0)).any()
    for row, mask in zip(where, inputs["attention_mask"], strict=True):
        kept = row[row >= 0]
        assert len(kept.unique()) == len(kept)
        assert mask[kept].all()
        assert torch.equal(inputs["input_ids"][0][where[0][where[0] >= 0]].unique(), torch.tensor([150]))
