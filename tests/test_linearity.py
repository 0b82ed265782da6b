"""Linearity against the golden values, scikit-learn's regression, and an SVD in float64; each rival's fault."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from torch import Tensor

from analyses.linearity import (
    Linearity,
    basis,
    cross_fits,
    fit,
    folds_of,
    held_out_score,
    linearity,
    score_of,
)
from analyses.moments import combine, pair_moments
from hooked_mm.errors import BadInputError
from tests.geometry import golden


def by_svd(x: Tensor, y: Tensor, cut_off: float = 1e-14) -> float:
    """1 - ||X A* - Y||^2 of centred rows over their norms, A* by the pseudo-inverse, in float64."""
    wide, target = (rows.double() - rows.double().mean(0) for rows in (x, y))
    wide, target = wide / wide.norm(), target / target.norm()
    left, sizes, right = torch.linalg.svd(wide, full_matrices=False)
    kept = sizes > cut_off * sizes[0]
    weight = right[kept].T @ ((left[:, kept].T @ target) / sizes[kept, None])
    return 1 - float((wide @ weight - target).square().sum())


def drawn(n: int, d: int, seed: int = 0, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """A residual stream and the next one, partly a linear map of it."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=random) * torch.linspace(0.1, 3, d) + 2
    weight = torch.randn(d, d, dtype=torch.float64, generator=random) / d**0.5
    return x, x + torch.tanh(x @ weight) + noise * torch.randn(n, d, dtype=torch.float64, generator=random)


def test_golden_values() -> None:
    """Of LLM-Microscope's formula, plain and main contribution; from rows and from moments of parts."""
    x, y, _ = golden()
    assert linearity(x, y).score == pytest.approx(0.99564858, abs=1e-6)
    assert linearity(x, y, main=True).score == pytest.approx(0.99594271, abs=1e-6)
    parts = [pair_moments(x[part], y[part]) for part in (slice(0, 300), slice(300, None))]
    assert score_of(combine(parts)).score == pytest.approx(0.99564858, abs=1e-6)
    assert score_of(combine(parts).difference()).score == pytest.approx(0.99594271, abs=1e-6)


@given(n=st.integers(12, 80), d=st.integers(1, 8), seed=st.integers(0, 99))
def test_agrees_with_scikit_learn(n: int, d: int, seed: int) -> None:
    """The score is R^2 of a linear regression with an intercept, columns weighted by variance; errors are its own."""
    x, y = drawn(n, d, seed)
    theirs = LinearRegression().fit(x.numpy(), y.numpy())
    found = linearity(x, y)
    expected = r2_score(y.numpy(), theirs.predict(x.numpy()), multioutput="variance_weighted")
    assert found.score == pytest.approx(expected, abs=1e-9)
    assert (found.n, found.rank) == (n, d)
    assert found.adjusted == pytest.approx(1 - (1 - expected) * (n - 1) / (n - 1 - d), abs=1e-9)
    map_ = fit(pair_moments(x, y))
    errors = np.linalg.norm(theirs.predict(x.numpy()) - y.numpy(), axis=1)
    np.testing.assert_allclose(map_.errors(x, y).numpy(), errors, atol=1e-8)
    spread = float((y - y.mean(0)).square().sum())
    assert float(map_.errors(x, y).square().sum()) == pytest.approx((1 - found.score) * spread, rel=1e-7)


@pytest.mark.parametrize("main", [False, True])
def test_agrees_with_an_svd_in_float64(main: bool) -> None:
    """To 1e-9, on float32 rows with an offset, one dimension a thousand times larger, and as many as fit a test."""
    x, y = drawn(3000, 150)
    x[:, 7] *= 1000
    y[:, 7] += x[:, 7]
    x, y = x.float(), y.float()
    target = y.double() - x.double() if main else y
    assert linearity(x, y, main=main).score == pytest.approx(by_svd(x, target), abs=1e-9)


def test_rank_deficiency_changes_nothing() -> None:
    """A duplicated and a constant column; an unguarded inverse of singular values made the score -1.5e13."""
    x, y = drawn(400, 6)
    wide = torch.cat([x, x[:, :1], torch.full((400, 1), 0.1)], 1)
    expected = by_svd(x, y)
    found = linearity(wide, y)
    assert found.score == pytest.approx(expected, abs=1e-9)
    assert found.rank == 6
    assert found.adjusted == pytest.approx(linearity(x, y).adjusted, abs=1e-9)
    weight = fit(pair_moments(wide, y)).weight
    assert float(weight.norm()) < 10 * float(fit(pair_moments(x, y)).weight.norm())
    assert linearity(wide, y, samples=torch.arange(400)).held_out == pytest.approx(
        linearity(x, y, samples=torch.arange(400)).held_out, abs=1e-9
    )
    doubled, target = torch.cat([x, x], 1), y - y.mean(0)
    assert linearity(doubled, y).score == pytest.approx(expected, abs=1e-9)
    # From moments alone there are no singular vectors of the rows to fall back on.
    alone = score_of(pair_moments(doubled, y))
    assert (alone.score, alone.rank) == (pytest.approx(expected, abs=1e-9), 6)
    centred = doubled - doubled.mean(0)
    left, sizes, right = torch.linalg.svd(centred / centred.norm(), full_matrices=False)
    unguarded = centred / centred.norm() @ (right.T / sizes @ left.T @ (target / target.norm()))
    assert not abs(1 - float((unguarded - target / target.norm()).square().sum()) - expected) < 1e-6


def test_nearly_dependent_columns_take_the_svd() -> None:
    """A column that differs from another by 1e-5 of it carries y: the Gram matrix alone is too coarse."""
    x, _ = drawn(500, 5)
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(500, dtype=torch.float64, generator=random)
    wide = torch.cat([x, x[:, :1] + 1e-5 * hidden[:, None]], 1)
    y = torch.stack([hidden, x[:, 2] + torch.randn(500, dtype=torch.float64, generator=random)], 1)
    exact = by_svd(wide, y)
    found = linearity(wide, y)
    assert basis(pair_moments(wide, y).x).doubtful
    assert found.score == pytest.approx(exact, abs=1e-9)
    assert found.condition > 1e4
    assert exact - linearity(x, y).score > 0.1


def test_noise_of_few_rows_is_not_linear() -> None:
    """n=1200, d=1000: noise scores .83 in sample; adjusted it is 0, and held out worse than the mean."""
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(240, 200, generator=random) for _ in range(2))
    found = linearity(x, y, samples=torch.arange(240) // 2)
    assert found.score == pytest.approx(199 / 239, abs=0.02)
    assert found.adjusted == pytest.approx(0, abs=0.03)
    assert found.held_out < 0


def test_as_many_dimensions_as_rows_explain_everything_and_say_nothing() -> None:
    """n <= d: 1 in sample, adjusted not a number, held out about 0 or below."""
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(30, 50, generator=random) for _ in range(2))
    found = linearity(x, y, samples=torch.arange(30))
    assert found.score == pytest.approx(1, abs=1e-9)
    assert np.isnan(found.adjusted)
    assert found.held_out < 0.05
    assert found.rank == 29


def test_held_out_fits_on_some_samples_and_scores_on_others() -> None:
    """From moments as by scikit-learn on the rows of each fold; samples stay whole."""
    x, y = drawn(120, 4)
    samples = torch.arange(120) // 3
    fold = folds_of(samples, 4, seed=5)
    assert all(len(fold[samples == sample].unique()) == 1 for sample in range(40))
    assert fold.bincount().tolist() == [30] * 4
    left = total = 0.0
    for number in range(4):
        inside, outside = fold != number, fold == number
        model = LinearRegression().fit(x[inside].numpy(), y[inside].numpy())
        left += float(np.square(model.predict(x[outside].numpy()) - y[outside].numpy()).sum())
        total += float((y[outside] - y[inside].mean(0)).square().sum())
    assert linearity(x, y, samples=samples, folds=4, seed=5).held_out == pytest.approx(1 - left / total, abs=1e-9)
    parts = [pair_moments(x[fold == number], y[fold == number]) for number in range(4)]
    assert held_out_score(parts) == pytest.approx(1 - left / total, abs=1e-9)
    errors = sum(
        float(map_.errors(x[fold == number], y[fold == number]).square().sum())
        for number, map_ in enumerate(cross_fits(parts))
    )
    assert errors == pytest.approx(left, rel=1e-9)


def test_rows_of_one_sample_kept_together_are_not_learnt_by_heart() -> None:
    """Rows of a sample that are nearly the same: dealt out row by row noise looks linear, by sample it does not."""
    random = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(40, 30, generator=random).repeat_interleave(5, 0) + 0.01 * torch.randn(200, 30, generator=random)
        for _ in range(2)
    )
    samples = torch.arange(40).repeat_interleave(5)
    assert linearity(x, y, samples=torch.arange(200)).held_out > 0.5
    assert linearity(x, y, samples=samples).held_out < 0.1


@given(seed=st.integers(0, 99), scale=st.floats(1e-6, 1e6), shift=st.floats(-1e3, 1e3))
def test_units_and_offsets_do_not_matter(seed: int, scale: float, shift: float) -> None:
    """x and y each times a number, plus a vector; rotations of either; a linear map scores 1."""
    x, y = drawn(60, 5, seed)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    expected = linearity(x, y).score
    assert linearity(scale * x + shift, y / scale - shift).score == pytest.approx(expected, abs=1e-7)
    assert linearity(x @ turn, y @ turn.T).score == pytest.approx(expected, abs=1e-9)
    assert linearity(x, x @ turn + shift).score == pytest.approx(1, abs=1e-9)
    assert isinstance(linearity(x, y), Linearity)


def test_refusals() -> None:
    """Rows of other positions, y that is constant, samples that do not fit, one fold."""
    x, y = drawn(20, 4)
    for wrong in (
        lambda: linearity(x, y[:5]),
        lambda: linearity(x[0], y[0]),
        lambda: linearity(x, y[:, :2], main=True),
        lambda: linearity(x, torch.ones_like(y)),
        lambda: linearity(x, x, main=True),
        lambda: linearity(x[:1], y[:1]),
        lambda: linearity(x, y, samples=torch.arange(5)),
        lambda: linearity(x, y, samples=torch.zeros(20)),
        lambda: linearity(x, y, samples=torch.arange(20), folds=1),
        lambda: linearity(x.where(x < x.max(), torch.nan), y),
    ):
        with pytest.raises(BadInputError):
            wrong()
