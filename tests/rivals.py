"""Rivals that tests measure against, loaded without what they need for other things."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans


def overcomplete_semi_nmf() -> Any:
    """overcomplete's `SemiNMF` class; skips the test where overcomplete is not installed.

    Its top-level `__init__` imports vision models and torchvision, of which the decompositions use nothing: an empty
    module with the same path stands in for it.
    """
    spec = importlib.util.find_spec("overcomplete") if "overcomplete" not in sys.modules else None
    if spec is not None:
        stand_in = types.ModuleType("overcomplete")
        stand_in.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["overcomplete"] = stand_in
    if "overcomplete" not in sys.modules:
        pytest.skip("overcomplete is not installed: pip install --no-deps overcomplete")
    return importlib.import_module("overcomplete.optimization").SemiNMF


def ding_objective(rows: np.ndarray, k: int, steps: int = 200) -> float:
    """||X - F G^T||^2 after the multiplicative updates of Ding, Li, Jordan (2010), in float64.

    As in the paper samples are columns of X, and G starts at k-means labels plus 0.2.
    """

    def above(values: np.ndarray) -> np.ndarray:
        return (np.abs(values) + values) / 2

    x = rows.T
    g = np.eye(k)[KMeans(k, n_init=4, random_state=0).fit_predict(rows)] + 0.2
    for _ in range(steps):
        f = x @ g @ np.linalg.pinv(g.T @ g)
        cross, inner = x.T @ f, f.T @ f
        g *= np.sqrt((above(cross) + g @ above(-inner)) / (above(-cross) + g @ above(inner)))
    f = x @ g @ np.linalg.pinv(g.T @ g)
    return float(((x - f @ g.T) ** 2).sum())
