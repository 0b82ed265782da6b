"""Cross-attention, encoder-decoders, Q-Formers, prefixes: points give what plain hooks at places by hand give."""

from __future__ import annotations

import pytest
import torch

from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from tests.families import close, raw_values
from tests.families_encoders_and_cross import MODELS


@pytest.mark.parametrize("family", MODELS)
def test_values_are_those_of_raw_hooks(family: str) -> None:
    """Bit for bit, but for products with a factor."""
    raw = miniature(family)
    inputs = miniature_inputs(raw, family=family)
    table = MODELS[family].places()
    expected = raw_values(raw, inputs, table)
    model = HookedMM(raw, check=False)
    assert set(table) <= set(model.hook_names), sorted(set(table) - set(model.hook_names))
    _, cache = model.run_with_cache(inputs, list(table))
    for name, value in expected.items():
        factor = table[name].factor
        assert close(cache[name], value) < 1e-6 if factor else torch.equal(cache[name], value), name
