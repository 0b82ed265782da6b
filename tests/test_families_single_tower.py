"""Architectures of one tower: a hook point gives what a plain PyTorch hook at the place written by hand gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import RECIPES, miniature, miniature_inputs
from tests.families import close, raw_hook, raw_values, shift
from tests.families_single_tower import MODELS


def built(family: str) -> Any:
    """The miniature; the test is skipped where a package that it needs is not installed."""
    for package in RECIPES[family].needs:
        pytest.importorskip(package)
    return miniature(family)


@pytest.mark.parametrize("family", MODELS)
def test_values_are_those_of_raw_hooks(family: str) -> None:
    """Bit for bit, but for products with a factor."""
    raw = built(family)
    inputs = miniature_inputs(raw, family=family)
    table = MODELS[family].places()
    expected = raw_values(raw, inputs, table)
    model = HookedMM(raw, check=False)
    assert set(table) <= set(model.hook_names), sorted(set(table) - set(model.hook_names))
    _, cache = model.run_with_cache(inputs, list(table))
    for name, value in expected.items():
        factor = table[name].factor
        assert close(cache[name], value) < 1e-6 if factor else torch.equal(cache[name], value), name


QUICK = ("aya_vision", "got_ocr2", "granite4_vision", "lfm3_vl", "mistral_large4")
WRITTEN = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in MODELS]


@pytest.mark.parametrize("family", WRITTEN)
def test_writes_are_those_of_raw_hooks(family: str) -> None:
    """In the first block of each plan, and outside blocks: another value gives the logits that a raw hook gives."""
    raw = built(family)
    inputs = miniature_inputs(raw, family=family)
    model = HookedMM(raw, check=False)
    with torch.no_grad():
        before = raw(**inputs).logits
    for name, place in MODELS[family].representatives().items():
        with torch.no_grad(), raw_hook(raw, place, shift):
            expected = raw(**inputs).logits
        logits = model.run_with_hooks(inputs, fwd_hooks=[(name, lambda value, hook: shift(value))])
        assert close(logits, expected) < 1e-5, name
        assert close(logits, before) > 1e-5, name
