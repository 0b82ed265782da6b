"""The untrained copy of a model: the same architecture, other weights, and nothing else in the process changes."""

from __future__ import annotations

import pytest
import torch

from hooked_mm.hooked import HookedMM
from hooked_mm.small.families import FAMILIES, build
from hooked_mm.untrained import untrained_copy


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HookedMM:
    """A small model of each family before training."""
    torch.manual_seed(3)
    made, processor = build(request.param)
    return HookedMM(made.eval().requires_grad_(False), processor, check=False)


def test_an_untrained_copy(model: HookedMM) -> None:
    """The same architecture as the family's, other weights, one seed one model; random numbers go on as before."""
    state = torch.get_rng_state()
    copies = [untrained_copy(model, seed).hf_model.state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    own = model.hf_model.state_dict()
    assert {n: v.shape for n, v in copies[0].items()} == {n: v.shape for n, v in own.items()}
    assert all(torch.equal(value, copies[1][name]) for name, value in copies[0].items())
    name = next(name for name in ("lm_head.weight", "model.transformer.ff_out.weight") if name in own)
    assert not torch.equal(copies[0][name], copies[2][name])
    assert not torch.equal(copies[0][name], own[name])
