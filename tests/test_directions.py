"""Directions against closed forms, scikit-learn and planted truth; and the sign test of fine-grained vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression

from concept_dict.decomposition import Decomposition
from concept_dict.kmeans import KMeans
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.pca import PCA
from concept_dict.semi_nmf import SemiNMF
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.store import ActivationStore
from steering.directions import KINDS, coarse, concept, concept_points, fine, principal, probe
from tests.steering_stores import DEEP, questions_store

SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="session")
def questions(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Questions about scenes, at the last token of the prompt."""
    return questions_store(llava, tmp_path_factory)


def two_sets(seed: int, n: int = 40, m: int = 30, d: int = 6, apart: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two classes that a plane tells apart, coordinates of different scales, in float64."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** np.arange(d) / 100
    shift = apart * rng.standard_normal(d)
    return rng.standard_normal((n, d)) * scale, (rng.standard_normal((m, d)) + shift) * scale


@given(n=st.integers(1, 20), m=st.integers(1, 20), d=st.integers(1, 5), seed=SEEDS)
def test_coarse_is_the_difference_of_means(n: int, m: int, d: int, seed: int) -> None:
    """In float64 by hand, for rows of any dtype; moving the source by it makes the means equal."""
    rng = np.random.default_rng(seed)
    one, other = 100 + rng.standard_normal((n, d)), rng.standard_normal((m, d))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        source, target = torch.as_tensor(one).to(dtype), torch.as_tensor(other).to(dtype)
        found = coarse(source, target)
        assert found.dtype == torch.float32
        by_hand = target.double().numpy().mean(0) - source.double().numpy().mean(0)
        np.testing.assert_allclose(found.numpy(), by_hand, rtol=1e-5, atol=1e-5)


@given(k=st.integers(1, 4), last=st.integers(1, 4), d=st.integers(1, 4), seed=SEEDS)
def test_fine_is_every_pair(k: int, last: int, d: int, seed: int) -> None:
    """c_j - c_i, numbered as they stand; within one set no concept moves to itself."""
    rng = np.random.default_rng(seed)
    one, other = rng.standard_normal((k, d)).astype("f"), rng.standard_normal((last, d)).astype("f")
    found, pairs = fine(torch.as_tensor(one), torch.as_tensor(other))
    assert pairs == [(i, j) for i in range(k) for j in range(last)]
    for vector, (i, j) in zip(found, pairs, strict=True):
        np.testing.assert_allclose(vector.numpy(), other[j] - one[i], atol=1e-6)
    if k > 1:
        within, pairs = fine(torch.as_tensor(one))
        assert len(within) == len(pairs) == k * (k - 1)
        assert all(i != j for i, j in pairs)
        # From i to j and back again leads nowhere.
        back = torch.stack([within[pairs.index((j, i))] for i, j in pairs])
        torch.testing.assert_close(within, -back)


@pytest.mark.parametrize("seed", range(3))
def test_probe_against_scikit_learn(seed: int) -> None:
    """Parallel to the regression on standardised rows put back into activation units; ends at the target's mean."""
    one, other = two_sets(seed)
    found = probe(torch.as_tensor(one), torch.as_tensor(other)).double().numpy()
    rows = np.concatenate([one, other])
    sigma = rows.std(axis=0)
    fitted = LogisticRegression(class_weight="balanced", max_iter=1000)
    fitted.fit((rows - rows.mean(axis=0)) / sigma, np.repeat([0, 1], [len(one), len(other)]))
    normal = fitted.coef_[0] / sigma
    normal /= np.linalg.norm(normal)
    assert found @ normal / np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    # A row's score moves as the row does: undone standardisation gives the same decisions.
    scores = rows @ normal
    assert np.corrcoef(scores, fitted.decision_function((rows - rows.mean(axis=0)) / sigma))[0, 1] > 1 - 1e-9
    moved = one + found
    assert moved.mean(axis=0) @ normal == pytest.approx(other.mean(axis=0) @ normal, rel=1e-5)
    assert np.linalg.norm(found) == pytest.approx((other.mean(axis=0) - one.mean(axis=0)) @ normal, rel=1e-5)


def test_probe_ignores_what_does_not_tell() -> None:
    """A large direction that both classes share is in the difference of means, and not in the probe."""
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 400, 2)) * [0.1, 100]
    other[:, 0] += 2
    wanted = np.array([1.0, 0.0])
    found = probe(torch.as_tensor(one), torch.as_tensor(other)).numpy()
    mean = coarse(torch.as_tensor(one), torch.as_tensor(other)).numpy()
    assert found @ wanted / np.linalg.norm(found) > 0.999
    assert mean @ wanted / np.linalg.norm(mean) < 0.9


@given(n=st.integers(2, 30), d=st.integers(2, 5), seed=SEEDS)
def test_principal_against_scikit_learn(n: int, d: int, seed: int) -> None:
    """The first right singular vector, which is not centred, towards the mean and as long as the mean along it."""
    drawn = np.random.default_rng(seed).standard_normal((n, d)) + 2
    svd = TruncatedSVD(1, algorithm="arpack" if d > 1 else "randomized", random_state=0).fit(drawn)
    component = svd.components_[0] * np.sign(svd.components_[0] @ drawn.mean(axis=0))
    found = principal(torch.as_tensor(drawn)).double().numpy()
    np.testing.assert_allclose(found, (drawn.mean(axis=0) @ component) * component, rtol=1e-3, atol=1e-4)
    assert found @ drawn.mean(axis=0) > 0


def test_concepts_themselves() -> None:
    """A row of the dictionary, bit for bit."""
    rows = torch.eye(3)
    assert torch.equal(concept(rows, 2), rows[2])
    with pytest.raises(BadInputError, match="no concept 3; there are 3"):
        concept(rows, 3)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("whiten", [0.0, 0.5])
def test_points_of_k_means_are_centroids(center: bool, whiten: float) -> None:
    """Of the rows it was fitted to, whatever its activations are; all rows count once."""
    rows = torch.as_tensor(np.concatenate(two_sets(3)), dtype=torch.float32)
    for activation in ("one_hot", "cosine", "inverse_distance"):
        fitted = KMeans(4, activation=activation, center=center, whiten=whiten, tol=0).fit(rows)  # type: ignore[arg-type]
        points = concept_points(rows, fitted)
        torch.testing.assert_close(points.values, fitted.cluster_centers_, rtol=1e-3, atol=1e-2)
        assert points.counts.tolist() == torch.bincount(fitted.labels_, minlength=4).tolist()


def test_points_of_a_factorisation_are_means_of_rows() -> None:
    """By hand from its activations; concepts without rows are left out, rows without concepts too."""
    wanted = torch.eye(4)[[0, 0, 1, 3]] * torch.tensor([1.0, 3.0, 2.0, 5.0])[:, None]
    rows = torch.cat([wanted, -torch.ones(2, 4)])
    fitted = NonNegativeDictionary(4, init=torch.eye(4), center=False, alpha=0.001, max_iter=1).fit(wanted)
    fitted.components_ = torch.eye(4)
    points = concept_points(rows, fitted)
    assert points.numbers.tolist() == [0, 1, 3]
    assert points.counts.tolist() == [2, 1, 1]
    torch.testing.assert_close(points.values, torch.diag(torch.tensor([2.0, 2.0, 0.0, 5.0]))[[0, 1, 3]])
    with pytest.raises(BadInputError, match="no row activates a concept"):
        concept_points(-torch.ones(2, 4), fitted)


def test_both_ends_of_signed_concepts_are_points() -> None:
    """Of one principal component, the negative side lies at number k + 0."""
    rows = torch.tensor([[-2.0, 0.0], [-1.0, 0.1], [1.0, -0.1], [2.0, 0.0]])
    points = concept_points(rows, PCA(1).fit(rows))
    assert sorted(points.values[:, 0].tolist()) == [-1.5, 1.5]
    assert points.numbers.tolist() == [0, 1]


def planted_rows(seed: int, k: int = 4, each: int = 60, d: int = 16) -> torch.Tensor:
    """Sums of few of k planted directions, one of them large: what every dictionary here can find."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((d, k)))[0].T
    main = np.repeat(np.arange(k), each)
    active = rng.exponential(0.2, (len(main), k)) * (rng.random((len(main), k)) < 0.3)
    active[np.arange(len(main)), main] += 2 + rng.exponential(0.5, len(main))
    return torch.as_tensor(active @ directions + 0.05 * rng.standard_normal((len(main), d)), dtype=torch.float32)


DICTIONARIES: dict[str, Decomposition] = {
    "KMeans, cosine": KMeans(4, activation="cosine"),
    "KMeans, 1 / (1 + distance)": KMeans(4, activation="inverse_distance"),
    "NonNegativeDictionary": NonNegativeDictionary(4),
    "NonNegativeDictionary, not centred": NonNegativeDictionary(4, center=False),
    "SemiNMF": SemiNMF(4, center=False),
}


def signs(rows: torch.Tensor, decomposition: Decomposition) -> list[tuple[float, float, float, float]]:
    """Per pair, after moving the rows of concept i half the way to j: mean rise of j and fall of i, and the share of
    rows for which either is so."""
    fitted = decomposition.fit(rows)
    points = concept_points(rows, fitted)
    main = torch.cdist(rows, fitted.cluster_centers_) if isinstance(fitted, KMeans) else -fitted.transform(rows)
    own = main.argmin(dim=1)
    vectors, pairs = fine(points.values)
    found = []
    for vector, pair in zip(vectors, pairs, strict=True):
        i, j = (int(points.numbers[number]) for number in pair)
        moving = rows[own == i]
        change = fitted.transform(moving + 0.5 * vector) - fitted.transform(moving)
        rise, fall = change[:, j], -change[:, i]
        found.append(
            (float(rise.mean()), float(fall.mean()), float((rise > 0).float().mean()), float((fall > 0).float().mean()))
        )
    return found


@pytest.mark.parametrize("name", DICTIONARIES)
def test_sign_on_planted_concepts(name: str) -> None:
    """Moving x along v_{i->j} raises concept j's activation and lowers concept i's, for every pair."""
    for rise, fall, rises, falls in signs(planted_rows(1), DICTIONARIES[name]):
        assert rise > 0
        assert fall > 0
        assert rises > 0.9
        assert falls > 0.75


@pytest.mark.parametrize("name", DICTIONARIES)
def test_sign_on_activations_of_a_model(name: str, questions: ActivationStore) -> None:
    """The same on the last prompt tokens of the small LLaVA."""
    rows = questions.where(question_type=["colour", "place"]).activations(DEEP)
    found = signs(rows, DICTIONARIES[name])
    assert len(found) >= 6
    for rise, fall, rises, _ in found:
        assert rise > 0
        assert fall > 0
        # Concepts of a few rows are among them.
        assert rises > 0.8


@given(alpha=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_sign_in_closed_form(alpha: float, seed: int) -> None:
    """Of the rows of cluster i, mean squared distances to i rise by alpha^2 |v|^2, to j fall by (2 alpha - alpha^2)
    |v|^2."""
    rows = planted_rows(seed, k=3, each=20, d=5).double()
    fitted = KMeans(3, tol=0).fit(rows)
    points = concept_points(rows, fitted)
    vectors, pairs = fine(points.values)
    for vector, (i, j) in zip(vectors.double(), pairs, strict=True):
        own = rows[fitted.labels_ == i]
        square = float(vector.square().sum())
        for concept_number, expected in ((i, alpha**2 * square), (j, (alpha**2 - 2 * alpha) * square)):
            centre = points.values[concept_number].double()
            change = (own + alpha * vector - centre).square().sum(1) - (own - centre).square().sum(1)
            assert float(change.mean()) == pytest.approx(expected, rel=1e-3, abs=1e-4 * square)


NAN = torch.tensor([[0.0, torch.nan]])


def test_refusals() -> None:
    """No rows, rows of two widths, NaN, no rows at all: each says what is wrong and what to do."""
    some, empty = torch.randn(3, 2), torch.zeros(0, 2)
    for make in (coarse, probe, fine):
        for source, target, message in (
            (empty, some, "there are no source rows"),
            (some, empty, "there are no target rows"),
            (some, torch.randn(3, 4), "source rows have width 2, target rows 4"),
            (NAN, some, "a set of source rows holds NaN"),
            (some[0], some, "2 dimensions"),
        ):
            with pytest.raises(BadInputError, match=message):
                make(source, target)
    for make_one in (principal, lambda rows: concept(rows, 0), lambda rows: concept_points(rows, KMeans(2).fit(some))):
        for bad in (empty, NAN):
            with pytest.raises(BadInputError, match=r"there are no|NaN"):
                make_one(bad)
    with pytest.raises(BadInputError, match="can't tell source from target"):
        probe(some, some)
    with pytest.raises(BadInputError, match="strength=0"):
        probe(some, some, strength=0)
    with pytest.raises(BadInputError, match="no common direction"):
        principal(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    with pytest.raises(BadInputError, match="no common direction"):
        principal(torch.zeros(3, 2))
    with pytest.raises(BadInputError, match="one concept makes no pair"):
        fine(some[:1])
    with pytest.raises(BadInputError, match="width"):
        concept_points(torch.randn(3, 5), KMeans(2).fit(some))


def test_every_kind_is_described() -> None:
    """What it needs, and what it is."""
    assert set(KINDS) == {"coarse", "fine", "concept", "probe", "principal", "shift"}
    assert all(len(needs) > 10 and len(does) > 10 for needs, does in KINDS.values())
