"""k-means against scikit-learn, Lloyd's conditions in float64, and planted clusters."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans as ScikitKMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import cosine_similarity

from concept_dict import rows as rows_module
from concept_dict.kmeans import KMeans
from hooked_mm.errors import BadInputError

SEEDS = st.integers(0, 2**31 - 1)


def _blobs(k: int = 6, each: int = 25, d: int = 8, apart: float = 12.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around k centres `apart` times as far from each other as rows from their own, and their labels."""
    rng = np.random.default_rng(seed)
    centres = apart * rng.standard_normal((k, d))
    labels = rng.permutation(np.repeat(np.arange(k), each))
    return centres[labels] + rng.standard_normal((k * each, d)), labels


@given(
    n=st.integers(3, 80),
    d=st.integers(1, 6),
    data=st.data(),
    chunk=st.integers(5, 100),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    scale=st.sampled_from([1e-2, 1.0, 100.0]),
    seed=SEEDS,
)
def test_the_end_is_a_fixed_point_of_lloyd(
    n: int, d: int, data: st.DataObject, chunk: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    """Each row belongs to its nearest centre, and each centre is the mean of its rows, recomputed in float64."""
    k = data.draw(st.integers(1, min(n, 7)))
    rows = torch.as_tensor(np.random.default_rng(seed).standard_normal((n, d)) * scale).to(dtype)
    with mock.patch.object(rows_module, "CHUNK", chunk):
        fitted = KMeans(k, tol=0, random_state=seed).fit(rows)
    wide, labels = rows.double().numpy(), fitted.labels_.numpy()
    distances = cdist(wide, fitted.cluster_centers_.double().numpy())
    own = distances[np.arange(n), labels]
    assert (own <= distances.min(axis=1) + 1e-3 * scale).all()
    for cluster in np.unique(labels):
        mean = wide[labels == cluster].mean(axis=0)
        np.testing.assert_allclose(fitted.cluster_centers_[cluster].numpy(), mean, atol=1e-4 * scale)
    assert fitted.inertia_ == pytest.approx((own**2).sum(), rel=1e-4, abs=1e-4 * scale**2)
    assert fitted.reconstruction_err_ == pytest.approx(fitted.inertia_**0.5)


@pytest.mark.parametrize("seed", range(4))
def test_inertia_is_near_the_best_of_scikit_learn(seed: int) -> None:
    """On touching blobs the best of ten starts is within 2 % of scikit-learn's best of ten."""
    rows, _ = _blobs(apart=1.5, seed=seed)
    best = ScikitKMeans(6, n_init=10, random_state=0).fit(rows).inertia_
    assert KMeans(6, n_init=10, random_state=seed).fit(rows).inertia_ <= 1.02 * best


@pytest.mark.parametrize("seed", range(4))
def test_takes_the_steps_of_scikit_learn(seed: int) -> None:
    """From the same start, Lloyd's algorithm ends at scikit-learn's centres and labels."""
    rows, _ = _blobs(apart=1.0, seed=seed)
    start = rows[np.random.default_rng(seed).choice(len(rows), 6, replace=False)]
    theirs = ScikitKMeans(6, init=start, n_init=1, tol=0, algorithm="lloyd").fit(rows)
    ours = KMeans(6, init=torch.as_tensor(start), tol=0).fit(rows)
    np.testing.assert_allclose(ours.cluster_centers_.numpy(), theirs.cluster_centers_, atol=1e-5)
    np.testing.assert_array_equal(ours.labels_.numpy(), theirs.labels_)
    assert ours.n_empty_ == 0


def _planted(seed: int) -> np.ndarray:
    """Sparse codes of random atoms with noise: rows without clear clusters."""
    rng = np.random.default_rng(seed)
    codes = rng.exponential(size=(400, 10)) * (rng.random((400, 10)) < 0.2)
    return codes @ rng.standard_normal((10, 24)) + 0.1 * rng.standard_normal((400, 24))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_inertia_from_the_same_centres_is_scikit_learns(center: bool, shift: float) -> None:
    """With default tolerances, wherever the rows lie: the same steps to the same inertia."""
    for seed, rows in enumerate([_planted(0), _planted(1), _blobs(k=12, apart=1.0)[0], _blobs(k=12, apart=4.0)[0]]):
        rows = (rows + shift).astype(np.float32)
        start = rows[np.random.default_rng(seed).choice(len(rows), 12, replace=False)]
        theirs = ScikitKMeans(12, init=start, n_init=1).fit(rows)
        ours = KMeans(12, init=torch.as_tensor(start), center=center).fit(rows)
        assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
        # They look for rows that change their cluster at the beginning of the next step.
        assert 0 <= theirs.n_iter_ - ours.n_iter_ <= 1


@pytest.mark.parametrize("n_init", [1, 4])
def test_inertia_is_scikit_learns_on_average(n_init: int) -> None:
    """The mean over seeds is within 1 % of theirs: starts are drawn as well."""
    for rows in (_planted(0), _blobs(k=12, apart=1.0)[0]):
        ours = [KMeans(12, n_init=n_init, random_state=seed).fit(rows).inertia_ for seed in range(12)]
        theirs = [ScikitKMeans(12, n_init=n_init, random_state=seed).fit(rows).inertia_ for seed in range(12)]
        assert np.mean(ours) <= 1.01 * np.mean(theirs)


def test_its_own_centres_are_an_end() -> None:
    """A fit from the centres of an earlier one has nothing to do; centres of another shape are refused."""
    rows, _ = _blobs(apart=3.0)
    first = KMeans(6, tol=0).fit(rows)
    again = KMeans(6, init=first.cluster_centers_, n_init=4).fit(rows)
    assert again.n_iter_ == 1
    assert again.inertia_ == pytest.approx(first.inertia_, rel=1e-6)
    with pytest.raises(BadInputError, match=r"init has shape \(6, 8\), the concepts need \(5, 8\)"):
        KMeans(5, init=first.cluster_centers_).fit(rows)
    with pytest.raises(BadInputError, match=r"init='random'; it must be 'k-means\+\+'"):
        KMeans(5, init="random").fit(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("center", [True, False])
def test_planted_blobs_are_found(center: bool) -> None:
    """Any one start finds well separated blobs: k-means++ draws a row of each, as a uniform draw seldom does."""
    for seed in range(10):
        rows, truth = _blobs(apart=300.0, each=10, seed=seed)
        fitted = KMeans(6, n_init=1, center=center, random_state=seed).fit(rows)
        assert adjusted_rand_score(truth, fitted.labels_.numpy()) == 1.0
        assert fitted.n_empty_ == 0


def test_more_starts_are_no_worse() -> None:
    """The best of several starts is kept, with its own labels."""
    better = 0
    for seed in range(5):
        rows, _ = _blobs(k=12, each=12, apart=1.0, seed=seed)
        # The first of the four starts is that of a single one.
        few, many = (KMeans(12, n_init=count, random_state=seed).fit(rows) for count in (1, 4))
        assert many.inertia_ <= few.inertia_
        better += many.inertia_ < 0.999 * few.inertia_
        centres = many.cluster_centers_.double().numpy()[many.labels_.numpy()]
        assert ((rows - centres) ** 2).sum() == pytest.approx(many.inertia_, rel=1e-5)
    assert better >= 2


def test_an_empty_cluster_takes_the_worst_row() -> None:
    """A start with one centre twice is mended by moving the empty one, once, to where rows are badly represented."""
    rows, truth = _blobs(k=3, apart=60.0)
    start = torch.as_tensor(rows[[np.flatnonzero(truth == c)[0] for c in (0, 0, 1)]]).float()
    fitted = KMeans(3, init=start[[0, 0, 2]]).fit(rows)
    assert fitted.n_empty_ == 1
    assert adjusted_rand_score(truth, fitted.labels_.numpy()) == 1.0


@given(distinct=st.integers(1, 5), copies=st.integers(2, 6), more=st.integers(1, 3), seed=SEEDS)
def test_fewer_distinct_rows_than_clusters(distinct: int, copies: int, more: int, seed: int) -> None:
    """Duplicated rows leave clusters empty: they are counted, every row is still represented, nothing is NaN."""
    rows = np.repeat(np.random.default_rng(seed).standard_normal((distinct, 4)), copies, axis=0)
    k = min(distinct + more, len(rows))
    fitted = KMeans(k, n_init=1, max_iter=5, random_state=seed).fit(rows)
    assert fitted.n_empty_ >= k - distinct
    assert torch.isfinite(fitted.components_).all()
    centres = fitted.cluster_centers_.double().numpy()
    np.testing.assert_allclose(centres[fitted.labels_.numpy()], rows, atol=1e-5)
    assert torch.isfinite(fitted.transform(rows)).all()


@pytest.mark.parametrize("center", [True, False])
def test_one_hot_gives_back_the_centre(center: bool) -> None:
    """One activation per row, and `inverse_transform` of it is the row's nearest centre."""
    rows, _ = _blobs(apart=3.0)
    fitted = KMeans(6, center=center).fit(rows)
    fresh = _blobs(apart=3.0, seed=1)[0]
    activations = fitted.transform(fresh)
    assert ((activations > 0).sum(dim=1) == 1).all()
    centres = fitted.cluster_centers_.double().numpy()
    nearest = centres[cdist(fresh, centres).argmin(axis=1)]
    np.testing.assert_allclose(fitted.inverse_transform(activations).numpy(), nearest, atol=1e-4)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_inverse_distance(scale: float) -> None:
    """1 / (1 + Euclidean distance to each centre)."""
    rows = _blobs(apart=3.0)[0] * scale
    fitted = KMeans(6, activation="inverse_distance").fit(rows)
    expected = 1 / (1 + cdist(rows, fitted.cluster_centers_.double().numpy()))
    np.testing.assert_allclose(fitted.transform(rows).numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_inverse_distance_at_the_centre(scale: float) -> None:
    """A row at its centre has activation 1 whatever its norm: no distance by cancellation of large squares."""
    # Thirty points at distances as in the residual stream of large models, each of them twice.
    rows = np.repeat(np.random.default_rng(0).standard_normal((30, 16)) * scale, 2, axis=0)
    fitted = KMeans(30, activation="inverse_distance").fit(rows)
    np.testing.assert_allclose(cdist(rows, fitted.cluster_centers_.numpy()).min(axis=1), 0, atol=1e-5 * scale)
    np.testing.assert_allclose(fitted.transform(rows).amax(dim=1).numpy(), 1.0, rtol=1e-2)


def test_cosine() -> None:
    """The cosine of row and centre, both from the mean; a zero row has none."""
    rows, _ = _blobs(apart=3.0)
    fitted = KMeans(6, activation="cosine").fit(rows)
    mean, centres = rows.mean(axis=0), fitted.cluster_centers_.double().numpy()
    got = fitted.transform(rows).numpy()
    np.testing.assert_allclose(got, cosine_similarity(rows - mean, centres - mean), atol=1e-5)
    assert (got < -0.1).any()
    assert not fitted.transform(fitted.mean_[None]).any()


def test_concepts_are_the_centres_directions() -> None:
    """Concepts have norm 1 and point from the mean to the centres."""
    rows, _ = _blobs()
    fitted = KMeans(6).fit(rows + 20)
    expected = fitted.cluster_centers_.double().numpy() - (rows + 20).mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(fitted.components_.numpy(), expected, atol=1e-5)


@given(chunk=st.integers(1, 40), activation=st.sampled_from(["one_hot", "inverse_distance", "cosine"]), seed=SEEDS)
def test_a_row_is_transformed_alone(chunk: int, activation: str, seed: int) -> None:
    """Activations depend neither on companions and their order, nor on the chunks."""
    rows, _ = _blobs(each=6, apart=3.0, seed=seed)
    fitted = KMeans(6, activation=activation, n_init=1).fit(rows)
    together = fitted.transform(rows)
    order = np.random.default_rng(seed).permutation(len(rows))
    with mock.patch.object(rows_module, "CHUNK", chunk):
        shuffled = fitted.transform(rows[order])
    torch.testing.assert_close(shuffled, together[torch.as_tensor(order)], rtol=1e-4, atol=1e-5)


def test_an_unknown_activation_is_refused() -> None:
    """The message has what was given and what there is."""
    with pytest.raises(BadInputError, match=r"activation='softmax'; it must be 'one_hot' or 'inverse_distance' or"):
        KMeans(2, activation="softmax").fit(np.eye(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["n_init", "max_iter"])
def test_a_count_below_one_is_refused(name: str) -> None:
    """No start or no iteration is refused by name; it is not a crash."""
    with pytest.raises(BadInputError, match=rf"{name}=0"):
        KMeans(2, **{name: 0}).fit(np.eye(3))
