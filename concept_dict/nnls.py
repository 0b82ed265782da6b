"""Non-negative least squares for many right-hand sides at once, exact to rounding.

min ||z - a C||^2 over a >= 0, by block principal pivoting (Kim & Park, "Fast nonnegative matrix factorization: an
active-set-like method and comparisons", 2011, algorithm 2), which needs only Z C^T and C C^T. It begins with what
a few sweeps of coordinate descent leave positive; each row's answer depends neither on its companions nor on where it
began, unlike that of coordinate descent stopped early.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-7
"""Added to the diagonal of C C^T, relative to its largest entry: the precision of float32."""

GROUP = 64
"""Rows whose systems are brought to one size."""

ROWS = 1024
"""Rows solved together; bounds the (rows, k, k) systems in memory."""

RELAXATION = 1.7
"""w: an update moves along a parabola, as high again at 2 as at 0; over many sweeps more than 1 is best."""

CACHED = 2**17
"""Activations swept together on a CPU, so that they stay in its cache."""

NEAR = 24
"""Sweeps of coordinate descent that guess which entries are positive."""


def hals_activations(
    cross: Float[Tensor, "n k"],
    gram: Float[Tensor, "k k"],
    start: Float[Tensor, "n k"],
    sweeps: int,
    relaxation: float = RELAXATION,
) -> Float[Tensor, "n k"]:
    """Improve A by coordinate descent.

    Args:
        cross: Z C^T - lambda.
        gram: C C^T.
        start: A to start from, non-negative.
        sweeps: Passes over the columns.
        relaxation: w.

    Returns:
        A (n, k), non-negative; the objective is no higher than at `start`.
    """
    step = max(1, CACHED // gram.shape[0]) if start.device.type == "cpu" else max(1, len(start))
    parts = zip(cross.split(step), start.split(step), strict=True)
    return torch.cat([_swept(wanted, gram, active, sweeps, relaxation) for wanted, active in parts])


def _swept(cross: Tensor, gram: Tensor, start: Tensor, sweeps: int, relaxation: float) -> Tensor:
    size = gram.diagonal()
    rate = torch.where(size > 0, relaxation / size, 0)[:, None]
    # With what stays of the old value on the diagonal, an update is one product: a_k = max(0, wanted_k + pull_k A).
    pull = -rate * gram
    pull.diagonal().copy_(torch.where(size > 0, 1 - relaxation, 1.0))
    # Columns of A are updated one after the other; as rows of a transposed copy they are contiguous.
    active, wanted = start.T.clone(memory_format=torch.contiguous_format), rate * cross.T
    found = torch.empty_like(active[0])
    turns = list(zip(active, wanted, pull, strict=True))
    for _ in range(sweeps):
        for column, target, weights in turns:
            torch.addmv(target, active.T, weights, out=found)
            torch.clamp_min(found, 0, out=column)
    return active.T.contiguous()


def nonnegative_least_squares(
    cross: Float[Tensor, "n k"], gram: Float[Tensor, "k k"], start: Float[Tensor, "n k"] | None = None
) -> Float[Tensor, "n k"]:
    """The non-negative a minimising ||z - a C||^2 for each row z.

    Args:
        cross: Z C^T.
        gram: C C^T. Concepts of zero norm get activation 0.
        start: Activations to start from, non-negative; it is found sooner from near ones.

    Returns:
        A (n, k), float32.
    """
    step = max(1, min(ROWS, 2**24 // max(1, gram.shape[0] ** 2)))
    start = torch.zeros(cross.shape, device=cross.device) if start is None else start
    near = hals_activations(cross.float(), gram.float(), start, NEAR)
    passive = near > 0
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
    if not len(rows):
        return
    count = passive[rows].sum(dim=1)
    order = count.argsort()
    for some in order.split(GROUP):
        # Systems as large as the most passive entries in the group, not as k; rows that have fewer are filled up.
        own, most = rows[some], int(count[some[-1]])
        if not most:
            answer[own] = 0
            continue
        entries = passive[own].byte().topk(most, dim=1).indices
        chosen = passive[own].gather(1, entries)
        pairs = gram[entries[:, :, None], entries[:, None, :]]
        system = torch.where(chosen[:, :, None] & chosen[:, None, :], pairs, torch.eye(most).to(gram))
        wanted = (cross[own].gather(1, entries) * chosen)[:, :, None]
        found = torch.cholesky_solve(wanted, torch.linalg.cholesky(system))[:, :, 0]
        answer[own] = torch.zeros_like(answer[own]).scatter(1, entries, found)
    slope[rows] = answer[rows] @ gram - cross[rows]
