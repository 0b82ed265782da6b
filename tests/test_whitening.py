"""Rows whitened before they are decomposed: concepts, activations and errors are still the rows' own."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import fractional_matrix_power
from scipy.optimize import linear_sum_assignment

from concept_dict import rows as rows_module
from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary
from concept_dict.kmeans import KMeans
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.semi_nmf import SemiNMF
from concept_dict.top_k_sae import TopKSAE
from concept_dict.top_norm import TopNorm
from concept_dict.whitening import FLOOR, whitening
from hooked_mm.errors import BadInputError

METHODS = [SemiNMF, NonNegativeDictionary, KMeans, TopNorm, TopKSAE]


def stretched(n: int = 400, d: int = 12, seed: int = 0) -> np.ndarray:
    """Sparse non-negative codes of four atoms, one of them ten times as large as the others, off the origin."""
    rng = np.random.default_rng(seed)
    codes = rng.gamma(2.0, 1.0, (n, 4)) * (rng.random((n, 4)) < 0.3)
    atoms = rng.standard_normal((4, d)) * np.array([[10.0], [1.0], [1.0], [1.0]])
    return codes @ atoms + 0.1 * rng.standard_normal((n, d)) + 3


def by_hand(rows: np.ndarray, power: float) -> np.ndarray:
    """S^(-power / 2) in float64, rows' squares kept."""
    centred = rows - rows.mean(0)
    found = np.real(fractional_matrix_power(centred.T @ centred, -power / 2))
    return found * np.sqrt((centred**2).sum() / ((centred @ found) ** 2).sum())


@given(power=st.sampled_from([0.25, 0.5, 1.0]), seed=st.integers(0, 99), chunk=st.integers(1, 500))
def test_the_matrix(power: float, seed: int, chunk: int) -> None:
    """It is scipy's power of the second moments; with power 1 all directions get the same size."""
    rows = stretched(d=5, seed=seed)
    with mock.patch.object(rows_module, "CHUNK", chunk):
        made = rows_module.Rows.of(rows).centred(True, power)
    expected = by_hand(rows, power)
    assert made.whitening is not None
    np.testing.assert_allclose(made.whitening.numpy(), expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    seen = torch.cat([chunk for _, chunk in made.chunks()]).double()
    assert made.size == pytest.approx(((rows - rows.mean(0)) ** 2).sum(), rel=1e-4)
    assert float(seen.square().sum()) == pytest.approx(made.size, rel=1e-6)
    sizes = torch.linalg.svdvals(seen)
    before = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    np.testing.assert_allclose(sizes / sizes[0], (before / before[0]) ** (1 - power), rtol=1e-2)


def test_flat_directions_are_not_blown_up() -> None:
    """What has next to no size is divided by the floor's root, not by its own; rows may span less than their width."""
    found = whitening(torch.diag(torch.tensor([1.0, FLOOR / 100, 0.0], dtype=torch.float64)), 1.0)
    ratios = found.diagonal() / found[0, 0]
    torch.testing.assert_close(ratios, torch.tensor([1.0, FLOOR**-0.5, FLOOR**-0.5]))
    flat = np.outer(np.arange(20.0), np.ones(6))
    assert NonNegativeDictionary(2, whiten=1.0).fit(flat).reconstruction_err_ < 1e-2 * np.linalg.norm(flat)


@pytest.mark.parametrize("method", METHODS)
def test_a_fit_is_one_of_rows_whitened_by_hand(method: type[Decomposition]) -> None:
    """Its concepts, put through the matrix, are those of whitened rows, and so are its activations, but for size."""
    rows = stretched()
    whole = by_hand(rows, 0.5)
    hand = method(4, center=False).fit((rows - rows.mean(0)) @ whole)
    fitted = method(4, whiten=0.5)
    active = fitted.fit_transform(rows).numpy()
    seen = fitted.components_.double().numpy() @ whole
    sizes = np.linalg.norm(seen, axis=1)
    cosines = hand.components_.double().numpy() @ (seen / sizes[:, None]).T
    order = linear_sum_assignment(-cosines)[1]
    assert cosines[np.arange(4), order].min() > 1 - 1e-3
    expected = hand.transform((rows - rows.mean(0)) @ whole).numpy()
    np.testing.assert_allclose((active * sizes)[:, order], expected, atol=2e-2 * expected.max())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_said_of_rows_holds_of_the_rows_themselves(method: type[Decomposition], tmp_path: Path) -> None:
    """Unit concepts, Z ~ mean + A C with the error that is reported, each row alone, saved and read again."""
    rows = stretched()
    fitted = method(4, whiten=0.5)
    active = fitted.fit_transform(rows)
    torch.testing.assert_close(fitted.components_.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(fitted.transform(rows), active, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fitted.transform(rows[7:8])[0], active[7], rtol=1e-3, atol=1e-3)
    left = rows - rows.mean(0) - active.double().numpy() @ fitted.components_.double().numpy()
    assert fitted.reconstruction_err_ == pytest.approx(np.linalg.norm(left), rel=1e-3)
    torch.testing.assert_close(
        fitted.inverse_transform(active), torch.tensor(rows - left).float(), rtol=1e-3, atol=1e-3
    )
    ConceptDictionary(fitted, "h").save(tmp_path)
    again = ConceptDictionary.load(tmp_path).decomposition
    assert torch.equal(again.transform(rows), fitted.transform(rows))
    assert again.whiten == 0.5


@pytest.mark.parametrize("activation", ["cosine", "inverse_distance"])
def test_kmeans_activations_that_are_no_coordinates(activation: str) -> None:
    """Cosines and distances are those of the whitened rows, and the error is that of the centres."""
    rows = stretched()
    whole = by_hand(rows, 0.5)
    fitted = KMeans(4, activation=activation, whiten=0.5)
    active = fitted.fit_transform(rows).numpy()
    seen, centres = (rows - rows.mean(0)) @ whole, (fitted.cluster_centers_.numpy() - rows.mean(0)) @ whole
    distances = np.linalg.norm(seen[:, None] - centres, axis=2)
    norms = np.linalg.norm(seen, axis=1)[:, None] * np.linalg.norm(centres, axis=1)
    expected = 1 / (1 + distances) if activation == "inverse_distance" else seen @ centres.T / norms
    np.testing.assert_allclose(active, expected, atol=1e-3)
    nearest = fitted.cluster_centers_.numpy()[distances.argmin(1)]
    assert fitted.reconstruction_err_ == pytest.approx(np.linalg.norm(rows - nearest), rel=1e-3)


def test_a_start_at_hand_is_whitened_too() -> None:
    """Concepts that were found are a start that is not left again."""
    rows = stretched()
    first = NonNegativeDictionary(4, whiten=0.5).fit(rows)
    again = NonNegativeDictionary(4, whiten=0.5, init=first.components_).fit(rows)
    assert again.objective_history_[0] == pytest.approx(first.objective_history_[-1], rel=1e-3)
    assert float((again.components_ * first.components_).sum(1).min()) > 0.99


def test_a_fit_without_forgets_an_earlier_one_with_it() -> None:
    """Nothing of the whitened fit is left."""
    rows = stretched()
    fitted = TopNorm(4, whiten=0.5).fit(rows)
    fitted.set_params(whiten=0.0)
    torch.testing.assert_close(fitted.fit_transform(rows), TopNorm(4).fit_transform(rows))
    assert not hasattr(fitted, "whitening_")


@pytest.mark.parametrize("power", [-0.1, 1.5])
def test_powers_that_can_not_be(power: float) -> None:
    """Refused, with what they may be."""
    with pytest.raises(BadInputError, match=f"whiten={power}; it must be between 0"):
        TopNorm(2, whiten=power).fit(stretched())
