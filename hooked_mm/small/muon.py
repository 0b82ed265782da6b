"""Muon: updates of equal size in every direction of a weight matrix, for float32 on a CPU.

As `torch.optim.Muon` (same update, same scaling), which orthogonalises one matrix at a time in bfloat16: on a CPU that
costs more than a small model's whole step. Here matrices of one shape are orthogonalised together, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration (Jordan et al. 2024, "Muon: an optimizer for hidden layers")."""


def orthogonalise(matrices: Float[Tensor, "n rows cols"], steps: int = 5) -> Float[Tensor, "n rows cols"]:
    """Matrices with the same singular vectors and singular values near 1 (between about .7 and 1.2)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, with decoupled weight decay.

    Args:
        params: Matrices.
        lr: An update's root mean square is 0.2 lr, as Adam's typically is (Liu et al. 2025, "Muon is scalable").
        momentum: Of the running mean of gradients, with Nesterov's look-ahead.
        weight_decay: Times lr, of every step.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - momentum)
                alike.setdefault(matrix.shape, []).append((matrix, matrix.grad.lerp(mean, momentum)))
            for shape, members in alike.items():
                updates = orthogonalise(torch.stack([update for _, update in members]))
                scale = 0.2 * math.sqrt(max(shape))
                for (matrix, _), update in zip(members, updates, strict=True):
                    matrix.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * scale)
