"""Muon: orthogonal updates, as PyTorch's own computes them in bfloat16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hooked_mm.small.muon import Muon, orthogonalise

SHAPES = [(6, 6), (4, 9), (9, 4)]


@given(st.sampled_from(SHAPES), st.integers(0, 2**31 - 1))
def test_singular_vectors_stay_and_values_become_one(shape: tuple[int, int], seed: int) -> None:
    """In the frame of the singular vectors the result is diagonal, with values near 1."""
    u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=torch.manual_seed(seed)).double())
    v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape)).double())
    values = torch.rand(min(shape)).double() * 0.9 + 0.1
    found = u.T @ orthogonalise(((u * values) @ v.T)[None])[0] @ v
    torch.testing.assert_close(found, found.diagonal().diag(), atol=1e-8, rtol=0)
    assert found.diagonal().min() > 0.6
    assert found.diagonal().max() < 1.3


def test_matrices_are_orthogonalised_each_for_itself() -> None:
    """Together as alone, whatever their scale."""
    many = torch.randn(3, 5, 7, generator=torch.manual_seed(0), dtype=torch.float64)
    alone = torch.cat([orthogonalise(one[None]) for one in many])
    torch.testing.assert_close(orthogonalise(many), alone)
    torch.testing.assert_close(orthogonalise(1e-3 * many), alone, atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    """Several steps with momentum and weight decay equal `torch.optim.Muon`'s, up to its bfloat16."""
    torch.manual_seed(1)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.02, momentum=0.9, weight_decay=0.1)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", nesterov=True
    )
    for _ in range(4):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved


def test_a_parameter_without_gradient_stays() -> None:
    """And is not weighed down either."""
    with_gradient, without = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    with_gradient.grad = torch.eye(3)
    Muon([with_gradient, without], lr=0.1).step()
    assert torch.equal(without, torch.ones(3, 3))
    assert not torch.equal(with_gradient, torch.ones(3, 3))
