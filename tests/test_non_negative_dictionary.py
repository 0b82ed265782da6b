"""The dictionary against scikit-learn's, from the same start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import DictionaryLearning, sparse_encode

from concept_dict.non_negative_dictionary import NonNegativeDictionary


def planted(n: int = 300, d: int = 20, k: int = 6) -> np.ndarray:
    """Sparse codes of random atoms with noise."""
    rng = np.random.default_rng(0)
    codes = rng.exponential(size=(n, k)) * (rng.random((n, k)) < 0.3)
    return codes @ rng.standard_normal((k, d)) + 0.1 * rng.standard_normal((n, d))


def objective(rows: np.ndarray, codes: np.ndarray, concepts: np.ndarray, penalty: float) -> float:
    """1/2 ||Z - A C||^2 + lambda ||A||_1."""
    return 0.5 * ((rows - codes @ concepts) ** 2).sum() + penalty * np.abs(codes).sum()


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.3])
def test_ends_where_scikit_learn_ends(alpha: float) -> None:
    """From the same concepts, no higher than its objective x (1 + 1e-4)."""
    rows = planted()
    start = rows[:6] / np.linalg.norm(rows[:6], axis=1, keepdims=True)
    ours = NonNegativeDictionary(6, alpha=alpha, init=torch.as_tensor(start), center=False)
    codes = ours.fit_transform(rows).double().numpy()
    penalty = alpha * ((rows**2).sum() / len(rows)) ** 0.5
    assert ours.penalty_ == pytest.approx(penalty, rel=1e-6)
    learner = DictionaryLearning(
        6,
        alpha=penalty,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        transform_alpha=penalty,
        positive_code=True,
        dict_init=start,
        code_init=np.zeros((len(rows), 6)),
        random_state=0,
    )
    theirs = objective(rows, learner.fit_transform(rows), learner.components_, penalty)
    assert objective(rows, codes, ours.components_.double().numpy(), penalty) <= theirs * (1 + 1e-4)


@pytest.mark.parametrize("alpha", [0.02, 0.3])
def test_codes_for_a_fixed_dictionary(alpha: float) -> None:
    """As good as scikit-learn's lasso, to 1e-6 of the objective."""
    rows = planted()
    fitted = NonNegativeDictionary(6, alpha=alpha, center=False).fit(rows)
    concepts = fitted.components_.double().numpy()
    theirs = sparse_encode(rows, concepts, algorithm="lasso_cd", alpha=fitted.penalty_, positive=True, max_iter=5000)
    ours = objective(rows, fitted.transform(rows).double().numpy(), concepts, fitted.penalty_)
    assert ours <= objective(rows, theirs, concepts, fitted.penalty_) * (1 + 1e-6)


def test_a_higher_price_means_fewer_activations() -> None:
    """Whatever the rows' scale: the price is relative to it."""
    rows = planted()
    shares = [float((NonNegativeDictionary(6, alpha=a).fit_transform(rows) > 0).float().mean()) for a in (0.01, 0.3)]
    assert shares[1] < 0.8 * shares[0]
    scaled = float((NonNegativeDictionary(6, alpha=0.3).fit_transform(1000 * rows) > 0).float().mean())
    assert scaled == pytest.approx(shares[1], abs=0.01)
