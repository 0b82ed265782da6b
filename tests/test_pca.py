"""Principal components against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as ScikitPCA

from concept_dict.pca import PCA
from hooked_mm.errors import BadInputError


@pytest.mark.parametrize("shape", [(200, 12), (10, 30)])
def test_components_are_scikit_learns_up_to_sign(shape: tuple[int, int]) -> None:
    """Directions, activations, shares of variance and error."""
    rows = np.random.default_rng(0).standard_normal(shape) * np.linspace(3, 1, shape[1]) + 5
    theirs = ScikitPCA(6, svd_solver="full").fit(rows)
    ours = PCA(6).fit(rows)
    signs = np.sign((ours.components_.numpy() * theirs.components_).sum(1))
    np.testing.assert_allclose(ours.components_.numpy(), theirs.components_ * signs[:, None], atol=1e-5)
    np.testing.assert_allclose(ours.transform(rows).numpy(), theirs.transform(rows) * signs, atol=1e-4)
    np.testing.assert_allclose(ours.explained_variance_ratio_.numpy(), theirs.explained_variance_ratio_, atol=1e-6)
    rest = rows - theirs.inverse_transform(theirs.transform(rows))
    assert ours.reconstruction_err_ == pytest.approx(np.linalg.norm(rest), rel=1e-5)
    assert ours.SIGNED


def test_signs_do_not_depend_on_chance() -> None:
    """The largest entry of every direction is positive."""
    found = PCA(5).fit(torch.randn(50, 8)).components_
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()


def test_no_more_directions_than_there_are() -> None:
    """Refused with both numbers."""
    with pytest.raises(BadInputError, match="n_components=5; rows of width 4"):
        PCA(5).fit(np.eye(9)[:, :4])
