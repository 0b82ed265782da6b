"""Bases against pseudo-inverses in float64, vectors laid along positions, one-line printing, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from hooked_mm.interventions import Add, ProjectOut
from hooked_mm.runner import Hook
from hooked_mm.value_layout import layout
from hooked_mm.vectors import Spread, checked, checked_number, orthonormal, show, unit
from tests.test_value_layout import make_batch

TEXT = (1, 2)


@given(
    count=st.integers(1, 4), copies=st.integers(0, 2), seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1, 1e4])
)
def test_a_basis_spans_what_the_directions_span(count: int, copies: int, seed: int, scale: float) -> None:
    """B^T B is the projector D^+ D of the directions, dependent ones included; rows are orthonormal or zero."""
    given = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) * scale
    given = torch.cat([given, given[:1].expand(copies, -1) * 3])
    basis = orthonormal("directions", given)
    assert basis.dtype == torch.float32
    expected = torch.linalg.pinv(given.double(), rtol=1e-5) @ given.double()
    assert (basis.double().T @ basis.double() - expected).abs().max() < 1e-5
    gram = basis @ basis.T
    assert torch.allclose(gram, torch.diag((gram.diagonal() > 0.5).float()), atol=1e-5)
    assert int((gram.diagonal() > 0.5).sum()) == count
    both = orthonormal("directions", torch.stack([given, given.flip(-1)]))
    assert torch.allclose(both[1].T @ both[1], (basis.T @ basis).flip(0, 1), atol=1e-5)


def test_one_per_sample_follows_the_rows() -> None:
    """(samples, d) goes to every row of its sample, with heads and beams; (samples,) likewise."""
    batch = make_batch([[TEXT, TEXT], [TEXT]])
    vectors = torch.arange(8.0).reshape(2, 4)
    for name, shape in (("blocks.0.hook_resid_post", (4, 2, 4)), ("blocks.0.attn.hook_z", (4, 2, 3, 4))):
        value = torch.zeros(shape)
        spread = Spread(value, layout(Hook(name, 0, 0, batch), shape))
        laid = (value + spread.vector("vector", vectors)).flatten(1, -2)
        assert all(torch.equal(laid[row, k], vectors[row // 2]) for row in range(4) for k in range(laid.shape[1]))
        numbers = (value + spread.number("alpha", torch.tensor([3.0, 5.0]))).flatten(1)
        assert numbers[:, 0].tolist() == [3, 3, 5, 5]
        assert (numbers == numbers[:, :1]).all()
        with pytest.raises(BadInputError, match=r"one per sample for 3, but the batch has 2"):
            spread.vector("vector", torch.zeros(3, 4))
        with pytest.raises(BadInputError, match=r"vector has length 5, but the vectors at 'blocks.0"):
            spread.vector("vector", torch.zeros(5))


def test_what_is_taken_and_what_is_refused() -> None:
    """Lists, NumPy arrays and whole numbers are taken; gradients are kept; nonsense is named."""
    assert checked("v", [1, 2], (1,)).dtype == torch.float32
    assert checked("v", np.ones(3), (1,)).dtype == torch.float64
    learnt = torch.ones(3, requires_grad=True)
    assert checked("v", learnt, (1,)) is learnt
    assert checked_number("alpha", 2) == 2.0
    assert torch.equal(torch.as_tensor(checked_number("alpha", [1.0, 2.0])), torch.tensor([1.0, 2.0]))
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: checked("v", "high", (1,)), "v must be an array of numbers; got str"),
        (lambda: checked("v", torch.zeros(2, 3), (1,)), r"v must be real numbers in 1 dimensions; got shape \(2, 3\)"),
        (lambda: checked("v", [float("nan")], (1,)), "v holds NaN"),
        (lambda: unit("v", [0.0, 0.0]), "v has length 0"),
        (lambda: orthonormal("v", [[1.0, 0.0], [0.0, 0.0]]), "v has a direction of length 0"),
    ]
    for make, message in wrong:
        with pytest.raises(BadInputError, match=message):
            make()


def test_printing_is_one_short_line() -> None:
    """Defaults and what is worked out are left out, tensors told by shape and norm."""
    assert repr(Add("hook_embed", [3.0, 4.0], 2)) == "Add('hook_embed', vector=<2 of norm 5>, alpha=2)"
    assert repr(ProjectOut("x", torch.eye(3), at="image", heads=[1])) == (
        "ProjectOut('x', at=Positions(modality='image'), heads=(1,), directions=<3x3 of norm 1.732>)"
    )
    assert show(str.lower) == "lower"
