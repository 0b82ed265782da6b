"""Semi-NMF against rivals, scipy, scikit-learn and planted truth; the objective is always recomputed in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.optimize import nnls
from sklearn.decomposition import PCA, DictionaryLearning

from concept_dict import nnls as nnls_module
from concept_dict import rows as rows_module
from concept_dict.factorisation import Factorisation, Init, ball_concepts
from concept_dict.nnls import RIDGE, hals_activations
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.semi_nmf import SemiNMF
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.captions import CAPTION_PROMPT, caption
from hooked_mm.scenes.world import Scene
from tests.rivals import ding_objective, overcomplete_semi_nmf

SEEDS = st.integers(0, 2**31 - 1)
DATA = ("planted", "noise", "real")
Data = dict[str, tuple[np.ndarray, int]]
Fits = dict[str, Factorisation]


def made(n_components: int, *, alpha: float = 0.01, tol: float = 1e-5, **options: Any) -> Factorisation:
    """Semi-NMF, or with a price the dictionary."""
    options |= {"n_components": n_components, "tol": tol}
    return NonNegativeDictionary(alpha=alpha, **options) if alpha else SemiNMF(**options)


def _planted(
    n: int = 600, d: int = 64, k: int = 10, density: float = 0.15, noise: float = 0.02, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows A C + noise for sparse non-negative A and random unit C (k, d); the rows and C."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((k, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = rng.gamma(2.0, 1.0, (n, k)) * (rng.random((n, k)) < density)
    return codes @ atoms + noise * rng.standard_normal((n, d)), atoms


def _clusters(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.repeat(2 * rng.standard_normal((8, 32)), 40, axis=0) + 0.3 * rng.standard_normal((320, 32))


@pytest.fixture(scope="module")
def data(llava: HookedMM, scenes: list[Scene], images: list[Image.Image]) -> Data:
    """Centred rows and a number of concepts: planted codes, noise, and the small model's residual stream."""
    batch = llava.prepare(images, CAPTION_PROMPT, [caption(scene) for scene in scenes])
    name = "blocks.2.hook_resid_post"
    _, cache = llava.run_with_cache(batch, name, stop_at_layer=3)
    real = cache.select(name, modality="text", role="answer").values.double().numpy()[::3]
    noise = np.random.default_rng(1).standard_normal((200, 24))
    rows = {"planted": (_planted(300, 32, 6)[0], 6), "noise": (noise, 8), "real": (real, 8)}
    return {name: (values - values.mean(axis=0), k) for name, (values, k) in rows.items()}


def _objective(fitted: Factorisation, rows: np.ndarray, activations: torch.Tensor | None = None) -> float:
    """||Z - mean - A C||^2 + 2 lambda sum(A) in float64."""
    made = (fitted.transform(rows) if activations is None else activations).double().numpy()
    rest = rows - fitted.mean_.double().numpy() - made @ fitted.components_.double().numpy()
    return float((rest**2).sum() + 2 * fitted.penalty_ * made.sum())


@pytest.fixture(scope="module")
def free(data: Data) -> Fits:
    """Fits without a price."""
    return {name: made(k, alpha=0, center=False).fit(rows) for name, (rows, k) in data.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.01])
@pytest.mark.parametrize("name", DATA)
def test_the_objective_falls(data: Data, free: Fits, name: str, alpha: float) -> None:
    """Every alternation lowers the objective, and the last one reported is that of `components_` and `transform`."""
    rows, k = data[name]
    fitted = made(k, center=False).fit(rows) if alpha else free[name]
    history = np.array(fitted.objective_history_)
    assert (np.diff(history) <= 1e-9 * history[:-1]).all()
    # A start at the optimum would make this hold for want of steps.
    assert fitted.n_iter_ > 10
    assert history[-1] < 0.95 * history[0]
    assert len(history) == fitted.n_iter_ + 2
    assert history[-1] == pytest.approx(_objective(fitted, rows), rel=1e-5)


@pytest.mark.parametrize("name", DATA)
def test_ends_no_higher_than_multiplicative_updates(data: Data, free: Fits, name: str) -> None:
    """Without a price, the end is no higher than 200 of Ding's updates."""
    rows, k = data[name]
    ours = _objective(free[name], rows)
    assert ours <= ding_objective(rows, k)
    # No k concepts do better than as many principal components: what is compared are sums of squares of the same rows.
    assert ours >= (np.linalg.svd(rows, compute_uv=False)[k:] ** 2).sum()


@pytest.mark.parametrize("name", DATA)
def test_ends_no_higher_than_overcomplete(data: Data, name: str) -> None:
    """With default settings, semi-NMF's end is no higher than that of overcomplete's."""
    rival = overcomplete_semi_nmf()
    rows, k = data[name]
    torch.manual_seed(0)
    codes, concepts = rival(nb_concepts=k).fit(torch.as_tensor(rows).float())
    theirs = ((rows - codes.detach().double().numpy() @ concepts.detach().double().numpy()) ** 2).sum()
    fitted = SemiNMF(k, center=False).fit(rows)
    assert _objective(fitted, rows) <= theirs
    # Not by going on for ever.
    assert fitted.n_iter_ < 60


def test_ends_no_higher_than_scikit_learn() -> None:
    """With a price, the end is no higher than scikit-learn's dictionary learning for the same objective."""
    rows, _ = _planted(150, 16, 5, noise=0.2)
    fitted = made(5, alpha=0.05, center=False).fit(rows)
    # Theirs is half of ours: 1/2 ||Z - A C||^2 + lambda sum(A), ||c_k|| <= 1.
    learner = DictionaryLearning(
        5, alpha=fitted.penalty_, max_iter=100, fit_algorithm="cd", transform_algorithm="lasso_cd", positive_code=True
    )
    learner.set_params(transform_alpha=fitted.penalty_, random_state=0)
    codes = learner.fit_transform(rows)
    theirs = ((rows - codes @ learner.components_) ** 2).sum() + 2 * fitted.penalty_ * codes.sum()
    assert _objective(fitted, rows) <= 1.001 * theirs


@given(
    shape=st.tuples(st.integers(8, 60), st.integers(2, 12), st.integers(1, 8), st.integers(1, 4)),
    alpha=st.sampled_from([0.0, 0.01, 0.2, 0.8]),
    init=st.sampled_from(["kmeans", "svd"]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    chunk=st.integers(7, 100),
    seed=SEEDS,
)
def test_the_objective_falls_whatever_the_rows(
    shape: tuple[int, ...], alpha: float, init: Init, scale: float, dtype: torch.dtype, chunk: int, seed: int
) -> None:
    """Any size, scale, dtype, start, price, chunk, and duplicated rows: no step raises the objective, all is finite."""
    n, d, k, copies = shape
    rows = np.random.default_rng(seed).standard_normal((n, d)) * scale + scale
    held = torch.as_tensor(np.repeat(rows[: -(-n // copies)], copies, axis=0)).to(dtype)
    k = min(k, 2 * d)
    with mock.patch.object(rows_module, "CHUNK", chunk):
        fitted = made(k, alpha=alpha, init=init, max_iter=40).fit(held)
    history, wide = np.array(fitted.objective_history_), held.double().numpy()
    size = ((wide - wide.mean(axis=0)) ** 2).sum()
    # Concepts and activations are float32; at a perfect fit nothing but its rounding is left.
    assert (np.diff(history) <= 1e-7 * size).all()
    assert history[-1] == pytest.approx(_objective(fitted, wide), rel=1e-4, abs=1e-6 * size)
    assert fitted.penalty_ == pytest.approx(alpha * (size / len(wide)) ** 0.5, rel=1e-5)
    activations = fitted.transform(held)
    assert (activations >= 0).all()
    used = activations.amax(dim=0) > 0
    torch.testing.assert_close(fitted.components_[used].norm(dim=1), torch.ones(int(used.sum())))
    assert torch.isfinite(fitted.components_).all()
    assert fitted.n_dead_ == k - int(used.sum())


@pytest.mark.parametrize("seed", range(3))
def test_planted_codes_are_recovered(seed: int) -> None:
    """With the default price every planted atom has a concept beside it."""
    rows, atoms = _planted(seed=seed)
    # The mean of sparse codes is a part of what they explain: to take it away would leave codes of both signs.
    concepts = made(10, center=False).fit(rows).components_.double().numpy()
    assert (atoms @ concepts.T).max(axis=1).min() > 0.95


def test_the_price_keeps_activations_few() -> None:
    """On centred clusters all activations rise together without a price, and a small one keeps many at zero."""
    rows = _clusters()
    free, priced = (made(8, alpha=alpha).fit(rows) for alpha in (0.0, 0.01))
    zeros = [float((fitted.transform(rows) == 0).double().mean()) for fitted in (free, priced)]
    assert zeros[0] < 0.15 < 0.4 < zeros[1]
    # The same rows at little more error.
    assert priced.reconstruction_err_ < 1.1 * free.reconstruction_err_


def test_one_concept_of_rows_on_one_side_is_the_first_singular_vector() -> None:
    """k = 1 without a price has a closed form where all rows lie on one side: the first principal axis."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(1, 2, (40, 1)) * np.array([1.0, 2.0, -1.0, 0.5, 0.0]) + 0.1 * rng.standard_normal((40, 5))
    fitted = made(1, alpha=0, center=False, tol=1e-12).fit(rows)
    axis = PCA(1).fit(np.vstack([rows, -rows])).components_[0]
    assert abs(float(fitted.components_[0].double().numpy() @ axis)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.3])
def test_transform_equals_scipy(alpha: float) -> None:
    """Activations of new rows are scipy's in float64."""
    rows, _ = _planted(200, 24, 6, noise=0.3)
    fitted = made(6, alpha=alpha, max_iter=20).fit(rows)
    fresh = _planted(60, 24, 6, noise=0.3, seed=5)[0]
    # As least squares alone: the ridge of `nnls` becomes further columns, the price a shift of the target.
    wide = np.hstack([fitted.components_.double().numpy(), RIDGE**0.5 * np.eye(6)])
    target = np.hstack([fresh - fitted.mean_.double().numpy(), np.zeros((60, 6))])
    target -= fitted.penalty_ * np.linalg.solve(wide @ wide.T, np.ones(6)) @ wide
    expected = np.stack([nnls(wide.T, row)[0] for row in target])
    np.testing.assert_allclose(fitted.transform(fresh).numpy(), expected, rtol=0, atol=2e-5 * expected.max())


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_a_row_is_transformed_alone(alpha: float) -> None:
    """A row's activations do not depend on companions, order or chunks, to 1e-6 of the largest."""
    rows, _ = _planted(120, 32, 8, seed=1)
    fitted = made(8, alpha=alpha).fit(rows)
    together = fitted.transform(rows)
    single = torch.cat([fitted.transform(rows[[index]]) for index in range(len(rows))])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    with mock.patch.object(rows_module, "CHUNK", 7):
        shuffled = fitted.transform(rows[order.numpy()])
    tolerance = 1e-6 * float(together.max())
    torch.testing.assert_close(single, together, rtol=0, atol=tolerance)
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=tolerance)
    torch.testing.assert_close(made(8, alpha=alpha).fit_transform(rows), together, rtol=0, atol=tolerance)


@given(n=st.integers(20, 60), chunk=st.integers(7, 60), seed=SEEDS)
def test_chunks_do_not_matter(n: int, chunk: int, seed: int) -> None:
    """Where rows are cut into chunks changes the fit by no more than rounding."""
    rows = np.random.default_rng(seed).standard_normal((n, 6))
    whole = made(3, max_iter=15).fit(rows)
    with mock.patch.object(rows_module, "CHUNK", chunk):
        parts = made(3, max_iter=15).fit(rows)
    torch.testing.assert_close(parts.components_, whole.components_, rtol=0, atol=1e-4)


def test_dtypes_agree() -> None:
    """Rows rounded to half precision have nearly the concepts of rows in float64."""
    rows = torch.as_tensor(_planted(120, 16, 4)[0])
    exact = made(4, center=False).fit(rows).components_
    for dtype, least in ((torch.float32, 1 - 1e-6), (torch.float16, 0.9999), (torch.bfloat16, 0.999)):
        found = made(4, center=False).fit(rows.to(dtype)).components_
        assert float((found * exact).sum(dim=1).min()) > least


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_a_dead_concept_is_given_to_a_row(alpha: float) -> None:
    """Of the two signs of the first singular vector one serves no row; it becomes the concept that rows lack."""
    # Two clusters on one side of their first singular vector, so that its negative would stay silent for ever.
    rows = np.repeat([[3.0, 2.0, 0.0], [3.0, -1.0, 0.0]], 20, axis=0)
    rows += 0.01 * np.random.default_rng(0).standard_normal((40, 3))
    fitted = made(2, alpha=alpha, init="svd", center=False).fit(rows)
    assert fitted.n_dead_ == 0
    assert fitted.reconstruction_err_ < 0.05 * np.linalg.norm(rows)


def test_what_no_row_needs_is_counted_as_dead() -> None:
    """One row again and again leaves five of six concepts from singular vectors unused: counted, silent, not NaN."""
    rows = np.repeat(np.random.default_rng(0).standard_normal((1, 12)), 60, axis=0)
    fitted = made(6, init="svd", center=False)
    activations = fitted.fit_transform(rows)
    silent = activations.amax(dim=0) == 0
    assert fitted.n_dead_ == int(silent.sum()) == 5
    assert not fitted.transform(rows)[:, silent].any()
    torch.testing.assert_close(fitted.components_.norm(dim=1), torch.ones(6))


def test_convergence_is_reported() -> None:
    """`converged_` says whether `tol` was reached within `max_iter`."""
    rows, _ = _planted(100, 16, 4)
    long, short = made(4, tol=1e-3).fit(rows), made(4, max_iter=2, tol=0).fit(rows)
    assert long.converged_
    size, last = ((rows - rows.mean(axis=0)) ** 2).sum(), long.objective_history_[-4:-1]
    # Of what is explained, in the last alternation and in none before.
    assert last[1] - last[2] <= 1e-3 * (size - last[2]) < last[0] - last[1]
    assert (short.converged_, short.n_iter_) == (False, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "random"}, r"init='random'; it must be 'kmeans' or 'svd'"),
        ({"alpha": -0.1}, r"alpha=-0.1; it must not be negative"),
        ({"n_components": 5, "init": "svd"}, r"init='svd' gives at most 4 concepts .* use 'kmeans'"),
        ({"n_components": 11}, r"n_components=11 needs to be between 1 and the number of rows, 10"),
    ],
)
def test_refuses(options: dict[str, object], message: str) -> None:
    """What can't be fitted is refused with the value and the remedy."""
    with pytest.raises(BadInputError, match=message):
        made(**{"n_components": 3, **options}).fit(np.eye(10)[:, :2])  # type: ignore[arg-type]


@settings(max_examples=6)
@given(alpha=st.sampled_from([0.0, 0.3]), size=st.sampled_from([0.1, 1.0]), seed=SEEDS)
def test_the_two_half_steps_reach_their_optima(alpha: float, size: float, seed: int) -> None:
    """Swept long enough, activations meet scipy's optimum, and concepts in the ball have no way down."""
    rng = np.random.default_rng(seed)
    rows, concepts = rng.standard_normal((10, 20)), rng.standard_normal((4, 20))
    gram = concepts @ concepts.T
    cross = torch.as_tensor(rows @ concepts.T - alpha)
    found = hals_activations(cross, torch.as_tensor(gram), torch.ones(10, 4).double(), 400).numpy()
    shift = alpha * np.linalg.solve(gram, np.ones(4)) @ concepts
    np.testing.assert_allclose(found, [nnls(concepts.T, row - shift)[0] for row in rows], atol=1e-6)
    codes = np.abs(rng.standard_normal((10, 4)))
    # Small rows have their optimum within the ball, large ones on its surface.
    inner, outer = codes.T @ codes, size * codes.T @ rows
    ball = ball_concepts(torch.as_tensor(inner), torch.as_tensor(outer), torch.zeros(4, 20).double(), 400).numpy()
    # At the optimum within the ball, a step against the slope, cut back to the ball, leads nowhere.
    step = ball - 0.01 * (inner @ ball - outer)
    step /= np.maximum(1, np.linalg.norm(step, axis=1, keepdims=True))
    np.testing.assert_allclose(step, ball, atol=1e-6)


@given(
    n=st.integers(1, 30), relaxation=st.floats(0.05, 1.95), silent=st.booleans(), block=st.integers(5, 200), seed=SEEDS
)
def test_no_sweep_raises_the_objective(n: int, relaxation: float, silent: bool, block: int, seed: int) -> None:
    """From any start, however relaxed; a concept of zero norm keeps its activations, and blocks do not matter."""
    rng = np.random.default_rng(seed)
    # Nearly parallel concepts, for which over-relaxation matters most.
    concepts = rng.standard_normal((5, 8)) + 3 * rng.standard_normal(8)
    concepts[2] *= not silent
    rows, active = rng.standard_normal((n, 8)), torch.as_tensor(rng.random((n, 5)))
    cross, gram = torch.as_tensor(rows @ concepts.T), torch.as_tensor(concepts @ concepts.T)
    for _ in range(4):
        given_start = active.clone()
        with mock.patch.object(nnls_module, "CACHED", block):
            found = hals_activations(cross, gram, active, 1, relaxation)
        before, after = (((rows - a.numpy() @ concepts) ** 2).sum(axis=1) for a in (active, found))
        assert (after <= before * (1 + 1e-12)).all()
        assert (found >= 0).all()
        assert torch.equal(active, given_start)
        if silent:
            assert torch.equal(found[:, 2], active[:, 2])
        torch.testing.assert_close(found, hals_activations(cross, gram, active, 1, relaxation))
        active = found


def test_a_perfect_fit_is_an_end() -> None:
    """Where nothing is left to explain, the objective falls by large shares of itself for ever; that is no reason."""
    rows, _ = _planted(noise=0.0)
    fitted = made(10, alpha=0, center=False, tol=1e-4).fit(rows)
    assert fitted.converged_
    assert fitted.n_iter_ < 150
    assert fitted.reconstruction_err_ < 0.05 * np.linalg.norm(rows)
