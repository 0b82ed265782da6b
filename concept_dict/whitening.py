"""Rows whitened, wholly or by half, before they are decomposed.

In a residual stream a few directions are far larger than the others (on the shipped models the largest has 10^2 to
10^4 times the squares of the median one), and what minimises squared errors spends its concepts on those. Multiplied by
S^(-power / 2), S = Z^T Z, directions with squares s get s^(1 - power): with power 1/2 the factor becomes its root, with
1 it is gone, and noise is as large as all else. `docs/concept_study.md` shows what that does to concepts. A whitened
dictionary keeps the matrix, 67 MB for a width of 4096.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

FLOOR = 1e-6
"""Directions with less than this share of the largest direction's squares are whitened as if they had that."""


def whitening(moments: Float64[Tensor, "d d"], power: float) -> Float[Tensor, "d d"]:
    """S^(-power / 2) for second moments S, scaled so that the sum of squares of the whitened rows stays what it was.

    Symmetric, so axes stay what they are. With power 1 all directions get the same size; with 1/2, sizes become their
    square roots.
    """
    values, vectors = torch.linalg.eigh(moments)
    largest = values.max().clamp_min(1e-300)
    factors = values.clamp_min(FLOOR * largest) ** (-power / 2)
    kept = (values.clamp_min(0) * factors**2).sum()
    factors = factors * (values.clamp_min(0).sum() / kept.clamp_min(1e-300)).sqrt()
    return ((vectors * factors) @ vectors.T).float()
