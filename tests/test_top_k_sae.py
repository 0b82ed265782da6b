"""The sparse autoencoder on planted codes; its parts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from concept_dict.rows import Rows
from concept_dict.top_k_sae import TopKSAE, top_k
from hooked_mm.errors import BadInputError


@given(n=st.integers(1, 6), k=st.integers(1, 8), data=st.data())
def test_top_k(n: int, k: int, data: st.DataObject) -> None:
    """The largest of each row, where positive, and zeros."""
    active = data.draw(st.integers(1, k))
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(n * 9 + k))
    found = top_k(values, active).numpy()
    for row, got in zip(values.numpy(), found, strict=True):
        keep = np.argsort(-row)[:active]
        expected = np.zeros(k, np.float32)
        expected[keep] = row[keep].clip(min=0)
        np.testing.assert_array_equal(got, expected)


def planted(n: int = 3000, d: int = 32, k: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one to three atoms, and the atoms."""
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((k, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = (1 + rng.random((n, k))) * (rng.random((n, k)) < 0.15)
    return codes @ atoms + 0.01 * rng.standard_normal((n, d)), atoms


def test_planted_atoms_are_found() -> None:
    """Most of them, with few activations a row, at any scale of the rows; no concept stays dead."""
    rows, atoms = planted()
    for scale in (1.0, 1000.0):
        fitted = TopKSAE(12, active=4, center=False, batch_size=128, max_iter=60, learning_rate=1e-2)
        active = fitted.fit_transform(scale * rows)
        match = fitted.components_.double().numpy() @ atoms.T
        found = match[linear_sum_assignment(-match)]
        assert np.mean(found > 0.9) >= 0.75, found
        assert int((active > 0).sum(1).max()) <= 4
        assert fitted.n_dead_ == 0
        assert fitted.reconstruction_err_ < 0.4 * np.linalg.norm(scale * rows)
        torch.testing.assert_close(fitted.components_.norm(dim=1), torch.ones(12))
        assert fitted.loss_history_[-1] < 0.5 * fitted.loss_history_[0]


def test_dead_concepts_begin_anew() -> None:
    """Concepts that start where no row is come to life."""
    rows, _ = planted(400)
    fitted = TopKSAE(12, active=2, center=False, batch_size=64, max_iter=20)
    fitted.begin(Rows.of(rows))
    with torch.no_grad():
        fitted._parameters[1][:5] = -1e3
    fitted.step()
    assert fitted.n_revived_ >= 5
    while not fitted.step():
        pass
    fitted.end()
    assert fitted.n_dead_ == 0


@pytest.mark.parametrize("name", ["active", "max_iter", "batch_size"])
def test_counts_below_one_are_refused(name: str) -> None:
    """Named with their value."""
    with pytest.raises(BadInputError, match=f"{name}=0; it must be at least 1"):
        TopKSAE(2, **{name: 0}).fit(np.eye(4))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same() -> None:
    """Start and order are drawn from it."""
    rows, _ = planted(200)
    one, two, other = (TopKSAE(6, max_iter=3, random_state=seed).fit(rows).components_ for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
