"""The hallucination score and its AUROC against scikit-learn, resampled by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from analyses.hallucination import clustered_auroc, hallucination_scores
from hooked_mm.errors import BadInputError


def test_the_score_is_one_minus_the_confidence() -> None:
    """And logits are not taken for probabilities."""
    assert hallucination_scores(torch.tensor([[0.0, 0.25, 1.0]])).tolist() == [[1.0, 0.75, 0.0]]
    with pytest.raises(BadInputError, match="outside 0 to 1"):
        hallucination_scores(torch.tensor([[1.5]]))


@given(st.integers(0, 10**6))
def test_the_estimate_is_scikit_learns_and_the_draws_are_those_of_whole_pictures(seed: int) -> None:
    """With ties and an entry left out; every draw computed again from repeated rows."""
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 6, (7, 4)).astype(float), rng.random((7, 4)) > 0.5
    truth[:, 0], truth[:, 1] = True, False
    scores[2, 3] = np.nan
    known = ~np.isnan(scores)
    ours = clustered_auroc(torch.tensor(scores), torch.tensor(truth), draws=15, seed=seed, level=0.8)
    assert ours[0] == pytest.approx(roc_auc_score(truth[known], scores[known]))
    drawn = torch.randint(7, (15, 7), generator=torch.Generator().manual_seed(seed)).numpy()
    again = [roc_auc_score(truth[rows][known[rows]], scores[rows][known[rows]]) for rows in drawn]
    assert ours[1:] == pytest.approx(tuple(np.quantile(again, [0.1, 0.9])))


def test_words_of_one_picture_are_no_samples_of_their_own() -> None:
    """The same picture many times over: an interval over entries would shrink, that over pictures does not."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(12, 3, generator=generator) > 0.5
    scores = truth + torch.randn(12, 3, generator=generator)
    narrow, wide = clustered_auroc(scores, truth), clustered_auroc(scores.repeat(1, 8), truth.repeat(1, 8))
    assert wide[2] - wide[1] == pytest.approx(narrow[2] - narrow[1])


def test_what_can_not_be_told_is_not_a_number_or_refused() -> None:
    """One kind only; shapes, draws and levels that make no sense."""
    assert math.isnan(clustered_auroc(torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool))[0])
    with pytest.raises(BadInputError, match=r"\(pictures, words\)"):
        clustered_auroc(torch.rand(3, 2), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(BadInputError, match="draws=0"):
        clustered_auroc(torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool), draws=0)
