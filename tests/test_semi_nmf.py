"""Semi-NMF is the alternation without a price; see `test_factorisation` for how well it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concept_dict.semi_nmf import SemiNMF
from hooked_mm.errors import BadInputError
from tests.rivals import ding_objective


def test_the_objective_is_dings() -> None:
    """||Z - A C||^2 of the result, in float64, no higher than his own updates reach."""
    rows = np.random.default_rng(0).standard_normal((80, 9))
    fitted = SemiNMF(4, center=False, tol=1e-6)
    active = fitted.fit_transform(rows).double().numpy()
    assert (active >= 0).all()
    error = ((rows - active @ fitted.components_.double().numpy()) ** 2).sum()
    assert fitted.objective_history_[-1] == pytest.approx(error, rel=1e-5)
    assert fitted.penalty_ == 0
    assert error <= ding_objective(rows, 4)


def test_concepts_at_hand_are_a_start() -> None:
    """From its own end a fit has nothing to do; concepts of another shape are refused."""
    rows = np.random.default_rng(0).standard_normal((80, 9))
    first = SemiNMF(4, tol=1e-6, max_iter=1000).fit(rows)
    again = SemiNMF(4, init=first.components_, tol=1e-4).fit(rows)
    assert again.n_iter_ < 5 < first.n_iter_
    assert again.objective_history_[-1] <= first.objective_history_[-1] * (1 + 1e-6)
    with pytest.raises(BadInputError, match=r"init has shape \(4, 9\), the concepts need \(5, 9\)"):
        SemiNMF(5, init=torch.ones(4, 9)).fit(rows)
