"""The rows of largest norm, and activations against SciPy's non-negative least squares."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from concept_dict.top_norm import TopNorm


def test_concepts_are_the_longest_rows() -> None:
    """Their directions, longest first; every row's activations are the non-negative optimum for them."""
    rows = np.random.default_rng(0).standard_normal((60, 7))
    centred = rows - rows.mean(0)
    fitted = TopNorm(4).fit(rows)
    longest = centred[np.argsort(-np.linalg.norm(centred, axis=1))[:4]]
    expected = longest / np.linalg.norm(longest, axis=1, keepdims=True)
    np.testing.assert_allclose(fitted.components_.numpy(), expected, atol=1e-6)
    active = np.stack([nnls(fitted.components_.double().numpy().T, row)[0] for row in centred])
    np.testing.assert_allclose(fitted.transform(rows).numpy(), active, atol=1e-5)


def test_center_off() -> None:
    """Norms are then those of the rows as they are."""
    rows = np.array([[10.0, 0], [10.5, 0], [9.0, 1]])
    assert TopNorm(1, center=False).fit(rows).components_.tolist() == [[1, 0]]
