"""Which attention rows go together, and whether they still do once others are accounted for.

CLEANN (Rohekar et al. 2023, arXiv 2310.20307) reads a head's attention as that of a linear structural equation model:
the row of token i holds what i takes from every token. With A (nodes, keys), the rows of the nodes over *all* keys that
they attend to (never over the nodes alone: what the rows share beside the nodes is what latent causes do),

    C = A A^T,   rho_ij = C_ij / sqrt(C_ii C_jj)

Nothing is subtracted: C is the covariance itself, not that of the rows about their means. The partial correlation of i
and j given S is that of what least squares by the rows of S leave of their rows, e_i = A_i - A_i A_S^+ A_S:

    rho_ij.S = e_i e_j / (|e_i| |e_j|)

A_S^+ is the pseudo-inverse, so a set whose rows depend on each other is no obstacle: it counts as what it spans. Where
S leaves nothing of i or j (i's row is a combination of those of S), there is no correlation to speak of; such a test is
*refused*. Everything is done on rows, not on C, whose small eigenvalues have lost half of their digits.

Fisher's z gives a two-sided p-value, with n the number of samples that the correlation counts as:

    z = sqrt(n - |S| - 3) artanh(rho_ij.S),   p = 2 (1 - Phi(|z|))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm.errors import BadInputError

SAMPLES, ALPHA = 128, 1e-5
"""What CLEANN takes for vision-language models: n of Fisher's z, and the level of a test."""
NOTHING_LEFT = 1e-6
"""The share of a row's length that must be left by a set for a test: rounding in single precision leaves less."""


def attention_correlation(rows: Float[Tensor, "*heads nodes keys"]) -> Float[Tensor, "*heads nodes nodes"]:
    """rho_ij = C_ij / sqrt(C_ii C_jj), C = A A^T.

    Args:
        rows: A, each node's softmaxed attention over all keys; padding has none.

    Returns:
        float64, with a diagonal of ones.

    Raises:
        BadInputError: If a row is not finite, or attends to nothing.
    """
    unit = unit_rows(rows)
    found = unit @ unit.mT
    found.diagonal(dim1=-2, dim2=-1).fill_(1)
    return found


def unit_rows(rows: Float[Tensor, "*heads nodes keys"]) -> Float[Tensor, "*heads nodes keys"]:
    """Rows of length 1, in float64, so that C is rho.

    Raises:
        BadInputError: If a row is not finite, or attends to nothing.
    """
    wide = rows.detach().double()
    lengths = wide.norm(dim=-1, keepdim=True)
    if not bool((lengths > 0).all()) or not bool(lengths.isfinite().all()):
        raise BadInputError(
            "a node's attention row is zero or not finite, so it correlates with nothing; leave that node out"
        )
    return wide / lengths


def partial_correlation(rows: Float[np.ndarray, "nodes keys"], i: int, j: int, given: Sequence[int] = ()) -> float:
    """rho_ij.S, between -1 and 1; NaN where S leaves nothing of i or j.

    Args:
        rows: Of length 1.
        i, j: Which two.
        given: S.

    Raises:
        BadInputError: If i, j and S are not all different.
    """
    own, other = [i, j], list(given)
    if len({*own, *other}) < 2 + len(other):
        raise BadInputError(f"i={i}, j={j}, given={other}: they must all be different")
    left = rows[own]
    if other:
        design = rows[other].T
        left = left - (design @ np.linalg.lstsq(design, left.T, rcond=NOTHING_LEFT)[0]).T
    lengths = np.sqrt((left * left).sum(axis=1))
    if (lengths <= NOTHING_LEFT).any():
        return math.nan
    return float(np.clip(left[0] @ left[1] / (lengths[0] * lengths[1]), -1, 1))


def fisher_p(rho: float, conditioned: int = 0, samples: int = SAMPLES) -> float:
    """The two-sided p-value of a partial correlation under independence, by Fisher's z.

    Args:
        rho: The partial correlation; +-1 gives 0.
        conditioned: |S|.
        samples: n.

    Returns:
        NaN if rho is NaN, or no degree of freedom is left (n <= |S| + 3).
    """
    freedom = samples - conditioned - 3
    if math.isnan(rho) or freedom <= 0:
        return math.nan
    if abs(rho) >= 1:
        return 0.0
    return math.erfc(math.sqrt(freedom / 2) * math.atanh(abs(rho)))


@dataclass(frozen=True)
class FisherTest:
    """A test of conditional independence of attention rows.

    Attributes:
        rows: Of length 1 (`fisher_test` makes them).
        alpha: Two are independent if p > alpha.
        samples: n of Fisher's z.
    """

    rows: Float[np.ndarray, "nodes keys"]
    alpha: float = ALPHA
    samples: int = SAMPLES

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise BadInputError(f"alpha={self.alpha}; the level of a test lies between 0 and 1")
        if self.samples <= 3:
            raise BadInputError(f"samples={self.samples}; Fisher's z needs more than 3")

    def p_value(self, i: int, j: int, given: Sequence[int] = ()) -> float:
        """NaN where the test is refused."""
        return fisher_p(partial_correlation(self.rows, i, j, given), len(given), self.samples)

    def __call__(self, i: int, j: int, given: Sequence[int] = ()) -> bool | None:
        """Whether i and j are independent given S; None where the test is refused."""
        value = self.p_value(i, j, given)
        return None if math.isnan(value) else value > self.alpha


def fisher_test(rows: Float[Tensor, "nodes keys"], alpha: float = ALPHA, samples: int = SAMPLES) -> FisherTest:
    """The test on one head's attention rows.

    Args:
        rows: A, each node's softmaxed attention over all keys; padding has none.
        alpha: Two are independent if p > alpha.
        samples: n of Fisher's z.

    Raises:
        BadInputError: If a row is zero or not finite, or alpha or samples make no sense.
    """
    unit = unit_rows(rows).cpu()
    # Rotated into the few dimensions that they span, which leaves every product as it is.
    return FisherTest(torch.linalg.qr(unit.T, mode="r").R.T.numpy(), alpha, samples)
