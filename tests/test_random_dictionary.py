"""The random dictionary: the best activations for its concepts, checked against SciPy and NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from concept_dict import random_dictionary
from concept_dict.random_dictionary import RandomDictionary

ROWS = torch.randn(17, 12, generator=torch.Generator().manual_seed(0)) + 1
OTHER = SimpleNamespace(components_=torch.zeros(5, 12), mean_=ROWS.mean(dim=0), transform=None)


def test_as_many_unit_concepts_around_the_same_mean() -> None:
    """Shape and mean of the other dictionary; the same for a seed, another for another."""
    made = RandomDictionary.like(OTHER)
    assert made.components_.shape == (5, 12)
    torch.testing.assert_close(made.components_.norm(dim=1), torch.ones(5))
    assert torch.equal(made.mean_, OTHER.mean_)
    assert torch.equal(made.components_, RandomDictionary.like(OTHER).components_)
    assert not torch.equal(made.components_, RandomDictionary.like(OTHER, seed=1).components_)


def test_non_negative_activations_are_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy's non-negative least squares, row by row; in chunks as at once, and for half precision rows."""
    made = RandomDictionary.like(OTHER)
    centred = (ROWS - made.mean_).double().numpy()
    expected = np.stack([nnls(made.components_.double().numpy().T, row)[0] for row in centred])
    np.testing.assert_allclose(made.transform(ROWS), expected, atol=1e-5)
    monkeypatch.setattr(random_dictionary, "CHUNK", 4)
    np.testing.assert_allclose(made.transform(ROWS), expected, atol=1e-5)
    found = made.transform(ROWS.bfloat16())
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_signed_activations_are_least_squares() -> None:
    """NumPy's least squares; with more concepts than dimensions rows are exact."""
    made = RandomDictionary.like(OTHER, signed=True)
    centred = (ROWS - made.mean_).double().numpy()
    expected = np.linalg.lstsq(made.components_.double().numpy().T, centred.T, rcond=None)[0].T
    np.testing.assert_allclose(made.transform(ROWS), expected, atol=1e-5)
    wide = SimpleNamespace(components_=torch.zeros(30, 12), mean_=ROWS.mean(dim=0), transform=None)
    made = RandomDictionary.like(wide, signed=True)
    torch.testing.assert_close(made.transform(ROWS) @ made.components_ + made.mean_, ROWS, atol=1e-4, rtol=0)


def test_no_rows() -> None:
    """Nothing in, nothing out."""
    assert RandomDictionary.like(OTHER).transform(ROWS[:0]).shape == (0, 5)
