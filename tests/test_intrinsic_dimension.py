"""Intrinsic dimension against golden values, scikit-dimension, plain loops and known manifolds; duplicates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analyses.intrinsic_dimension import (
    distinct_neighbours,
    intrinsic_dimension,
    levina_bickel,
    maximum_likelihood,
    two_nn,
    two_nn_microscope,
)
from analyses.neighbours import nearest
from hooked_mm.errors import BadInputError
from tests.geometry import golden


def ratios(rows: Tensor) -> Tensor:
    """r_2 / r_1 by all differences; inf for copies."""
    apart = (rows.double()[:, None] - rows.double()).norm(dim=2).fill_diagonal_(torch.inf)
    near = apart.topk(2, largest=False).values
    return near[:, 1] / near[:, 0]


def by_hand(mu: Tensor) -> tuple[float, float, float]:
    """scikit-dimension's, LLM-Microscope's and the likelihood's, in loops of Python floats."""
    ordered = sorted(mu.tolist())
    n = len(ordered)

    def slope(points: list[tuple[float, float]]) -> float:
        return sum(x * y for x, y in points) / sum(x * x for x, _ in points)

    kept = int(n * (1 - 0.1))
    theirs = slope([(math.log(ordered[j - 1]), -math.log(1 - j / n)) for j in range(1, kept + 1)])
    useful = [ratio for ratio in ordered if ratio > 1 + 1e-8]
    m, u = len(useful), n - len(useful)
    microscope = slope([(math.log(useful[j - 1]), -math.log(1 - (j + u) / (m + u))) for j in range(1, m // 5 + 1)])
    return theirs, microscope, (n - 1) / sum(math.log(ratio) for ratio in ordered)


def test_golden_values() -> None:
    """Three dimensions in fifty: 2.98913 by LLM-Microscope's, 3.07955 by scikit-dimension's, 3.08131 by likelihood."""
    found = intrinsic_dimension(golden().z)
    assert found.two_nn_microscope == pytest.approx(2.98913, abs=6e-6)
    assert found.two_nn == pytest.approx(3.07955, abs=6e-6)
    assert found.maximum_likelihood == pytest.approx(3.08131, abs=6e-6)
    assert (found.n, found.duplicates, found.k) == (1000, 0, 20)
    expected = by_hand(ratios(golden().z))
    assert (found.two_nn, found.two_nn_microscope, found.maximum_likelihood) == pytest.approx(expected, abs=1e-9)


def test_agrees_with_scikit_dimension() -> None:
    """TwoNN, its likelihood and Levina-Bickel's to 1e-6, in few and many dimensions."""
    skdim = pytest.importorskip("skdim", reason="scikit-dimension is not installed", exc_type=ImportError)
    random = np.random.default_rng(1)
    for rows in (golden().z.numpy(), random.standard_normal((400, 12)), random.standard_normal((300, 60)) ** 3):
        found = intrinsic_dimension(torch.as_tensor(rows), k=15)
        assert found.two_nn == pytest.approx(skdim.id.TwoNN().fit(rows).dimension_, abs=1e-6)
        likelihood = skdim.id.TwoNN(discard_fraction=0, method="mle").fit(rows).dimension_
        assert found.maximum_likelihood == pytest.approx(likelihood, abs=1e-6)
        assert found.levina_bickel == pytest.approx(skdim.id.MLE().fit(rows, n_neighbors=15).dimension_, abs=1e-6)
        near = nearest(torch.as_tensor(rows), 15).distances
        mean = skdim.id.MLE().fit(rows, n_neighbors=15, comb="mean").dimension_
        assert levina_bickel(near, "mean") == pytest.approx(mean, abs=1e-6)


@given(n=st.integers(12, 120), d=st.integers(1, 6), seed=st.integers(0, 99))
def test_agrees_with_plain_loops(n: int, d: int, seed: int) -> None:
    """All four, with ties among the ratios."""
    rows = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    near = nearest(rows, 5).distances
    mu = ratios(rows)
    mu[:2] = 1.0
    found = (two_nn(mu), two_nn_microscope(mu), maximum_likelihood(mu))
    assert found == pytest.approx(by_hand(mu), rel=1e-9)
    inverse = [sum(math.log(row[-1] / other) for other in row[:-1]) / 4 for row in near.tolist()]
    assert levina_bickel(near) == pytest.approx(1 / (sum(inverse) / n), rel=1e-9)
    assert levina_bickel(near, "mean") == pytest.approx(sum(1 / one for one in inverse) / n, rel=1e-9)
    assert levina_bickel(near[:, :2]) == pytest.approx(maximum_likelihood(ratios(rows)) * n / (n - 1), rel=1e-9)


def test_duplicates_are_removed_and_counted() -> None:
    """300 copies of rows in 1,000 move LLM-Microscope's from 2.99 to 27.5; left out they move nothing, and are told."""
    z = golden().z
    copied = z.clone()
    copied[700:] = z[:300]
    mu = ratios(copied)
    useful = mu[mu.isfinite()]
    theirs = two_nn_microscope(useful, dropped=1000 - len(useful))
    assert theirs > 15
    found, alone = intrinsic_dimension(copied), intrinsic_dimension(z[:700])
    assert (found.n, found.duplicates) == (700, 300)
    for name in ("two_nn", "two_nn_microscope", "maximum_likelihood", "levina_bickel"):
        assert getattr(found, name) == getattr(alone, name)
    assert 2.5 < found.two_nn < 3.5


def test_one_padding_row_many_times() -> None:
    """As padding and first tokens are: one row of them is left; near copies by tolerance."""
    rows = torch.cat([golden().z[:500], torch.zeros(200, 50, dtype=torch.float64)])
    found = intrinsic_dimension(rows)
    assert (found.n, found.duplicates) == (501, 199)
    rows[500:] += 1e-7 * torch.randn(200, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert intrinsic_dimension(rows).duplicates == 0
    near = intrinsic_dimension(rows, tolerance=1e-5)
    assert (near.n, near.duplicates) == (501, 199)
    assert near.two_nn == pytest.approx(found.two_nn, abs=1e-4)
    kept = distinct_neighbours(rows, 2, 1e-5).kept
    assert kept.tolist() == list(range(501))


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_manifolds_of_known_dimension(dimension: int) -> None:
    """Even on a torus, bent into twice as many coordinates and turned into forty: what is there, within noise."""
    random = torch.Generator().manual_seed(dimension)
    angles = 2 * math.pi * torch.rand(1500, dimension, dtype=torch.float64, generator=random)
    bent = torch.cat([angles.cos(), angles.sin()], 1)
    turn = torch.linalg.qr(torch.randn(40, 2 * dimension, dtype=torch.float64, generator=random)).Q
    found = intrinsic_dimension(bent @ turn.T + 3)
    for name in ("two_nn", "maximum_likelihood", "levina_bickel", "two_nn_microscope"):
        assert getattr(found, name) == pytest.approx(dimension, rel=0.16), name


def test_refusals() -> None:
    """Ratios below 1, infinite or too few; shares out of range; copies; lattices; too few distinct rows."""
    mu = torch.tensor([1.0, 1.5, 2.0, 3.0])
    for wrong in (
        lambda: two_nn(torch.tensor([0.5, 2.0, 3.0])),
        lambda: two_nn(torch.tensor([torch.inf, 2.0, 3.0])),
        lambda: two_nn(mu[:1]),
        lambda: two_nn(mu, discard=0.9),
        lambda: two_nn(mu, discard=0.0),
        lambda: two_nn_microscope(mu),
        lambda: maximum_likelihood(torch.ones(5)),
        lambda: levina_bickel(torch.tensor([[0.0, 1.0], [1.0, 2.0]])),
        lambda: levina_bickel(torch.ones(3, 1)),
        lambda: levina_bickel(torch.ones(3, 4)),
        lambda: levina_bickel(torch.tensor([[1.0, 1.0], [1.0, 2.0]]), "mean"),
        lambda: intrinsic_dimension(torch.zeros(100, 3)),
        lambda: intrinsic_dimension(torch.randn(100, 3), k=1),
    ):
        with pytest.raises(BadInputError):
            wrong()
