"""Early fusion and its makers' other models: every activation and every write equals a raw PyTorch hook's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from tests.families import Place, close, raw_hooks, raw_values
from tests.families_early_fusion import FAMILIES, TEXT, TOWER, places

Case = tuple[str, HookedMM, dict[str, Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    """A miniature, wrapped, and a batch padded on the left."""
    model = miniature(request.param)
    return request.param, HookedMM(model, check=False), miniature_inputs(model, family=request.param)


def mild(value: Tensor, hook: Any = None) -> Tensor:
    """A change that many of its kind survive."""
    return value * 0.95 + 0.01


def test_values_are_those_of_raw_hooks(case: Case) -> None:
    """Every point that was found by hand is listed, and its value is the module's, bit for bit."""
    family, model, inputs = case
    table = places(family)
    assert set(table) <= set(model.hook_names), sorted(set(table) - set(model.hook_names))
    assert model.cfg.n_layers == len(TEXT[family])
    assert (model.cfg.vision.n_layers if model.cfg.vision else 0) == len(TOWER.get(family, []))
    raw = raw_values(model.hf_model, inputs, table)
    logits, cache = model.run_with_cache(inputs, list(table))
    with torch.no_grad():
        assert torch.equal(logits, model.hf_model(**inputs).logits)
    for name, value in cache.items():
        assert torch.equal(value.reshape(raw[name].shape), raw[name]), name


def test_writes_are_those_of_raw_hooks(case: Case) -> None:
    """All at once: the logits are those of raw hooks that write the same."""
    family, model, inputs = case
    chosen: dict[tuple[str, str, str], tuple[str, Place]] = {}
    for name, place in places(family).items():
        chosen.setdefault((place.path, place.side, place.view), (name, place))
    with torch.no_grad(), raw_hooks(model.hf_model, [(place, mild) for _, place in chosen.values()]):
        expected = model.hf_model(**inputs).logits
    got = model.run_with_hooks(inputs, [([name for name, _ in chosen.values()], mild)])
    plain = model.run_with_hooks(inputs)
    spoken = expected > -1e30
    assert torch.equal(spoken, got > -1e30)
    assert close(got[spoken], expected[spoken]) < 1e-5
    assert close(got[spoken], plain[spoken]) > 1e-3
