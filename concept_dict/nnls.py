"""Non-negative least squares for many right-hand sides at once, exact to rounding.

min ||z - a C||^2 over a >= 0, by block principal pivoting (Kim & Park, "Fast nonnegative matrix factorization: an
active-set-like method and comparisons", 2011, algorithm 2), which needs only Z C^T and C C^T. Each row is solved alone,
so its answer depends neither on its companions nor on a starting point, unlike coordinate descent stopped early.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-7
"""Added to the diagonal of C C^T, relative to its largest entry: the precision of float32."""

ROWS = 1024
"""Rows solved together; bounds the (rows, k, k) systems in memory."""


def nonnegative_least_squares(
    cross: Float[Tensor, "n k"], gram: Float[Tensor, "k k"], near: Float[Tensor, "n k"] | None = None
) -> Float[Tensor, "n k"]:
    """The non-negative a minimising ||z - a C||^2 for each row z.

    Args:
        cross: Z C^T.
        gram: C C^T. Concepts of zero norm get activation 0.
        near: Activations near the optimum: it is found sooner if it is positive where they are.

    Returns:
        A (n, k), float32.
    """
    step = max(1, min(ROWS, 2**24 // max(1, gram.shape[0] ** 2)))
    passive = torch.zeros(cross.shape, dtype=torch.bool, device=cross.device) if near is None else near > 0
    parts = zip(cross.split(step), passive.split(step), strict=True)
    return torch.cat([_solve(some.double(), gram.double(), start) for some, start in parts]).float()


def _solve(cross: Tensor, gram: Tensor, passive: Tensor) -> Tensor:
    k = gram.shape[0]
    usable = gram.diagonal() > 0
    # Where concepts nearly cancel: the smallest of the solutions that float32 can't tell apart, not a huge one.
    gram = gram + torch.eye(k, dtype=gram.dtype, device=gram.device) * RIDGE * gram.diagonal().max().clamp_min(1e-300)
    scale = cross.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    tolerance = 1e-12 * scale
    passive = passive & usable
    answer, slope = torch.zeros_like(cross), -cross
    _stationary(passive.any(dim=1).nonzero()[:, 0], passive, cross, gram, answer, slope)
    fewest = torch.full((len(cross),), k + 1, device=cross.device)
    patience = torch.full((len(cross),), 3, device=cross.device)
    index = torch.arange(k, device=cross.device)
    for _ in range(100 * k + 100):
        wrong = torch.where(passive, answer < -tolerance, slope < -tolerance) & usable
        count = wrong.sum(dim=1)
        if not bool(count.any()):
            break
        better = count < fewest
        fewest = torch.where(better, count, fewest)
        patience = torch.where(better, 3, patience - 1)
        # Exchange all wrong entries while that helps; else only the last, which can't cycle (Murty's rule).
        last = torch.where(wrong, index, -1).amax(dim=1, keepdim=True)
        passive = passive ^ torch.where((better | (patience >= 0))[:, None], wrong, wrong & (index == last))
        _stationary(count.nonzero()[:, 0], passive, cross, gram, answer, slope)
    return answer.clamp_min(0) * usable


def _stationary(rows: Tensor, passive: Tensor, cross: Tensor, gram: Tensor, answer: Tensor, slope: Tensor) -> None:
    """Set the least-squares answers of some rows over their passive entries, and the slopes there."""
    chosen = passive[rows]
    system = torch.where(chosen[:, :, None] & chosen[:, None, :], gram, torch.eye(len(gram)).to(gram))
    factor = torch.linalg.cholesky(system)
    answer[rows] = torch.cholesky_solve((cross[rows] * chosen)[:, :, None], factor)[:, :, 0]
    slope[rows] = answer[rows] @ gram - cross[rows]
