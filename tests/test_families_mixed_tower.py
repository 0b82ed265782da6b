"""Architectures of several towers, experts or state spaces: a hook point gives what a plain PyTorch hook gives.

The places are written by hand in `families_mixed_tower`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_mm.hooked import HookedMM
from hooked_mm.testing import mixed_tower, mixed_tower_ocr
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from tests.families import Function, close, raw_hook, raw_values, shift
from tests.families_mixed_tower import MODELS


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


def first_only(function: Function) -> Function:
    """The same on the first value, and nothing afterwards: Ovis asks its table for the marks of images, too."""
    seen: list[Tensor] = []

    def changed(value: Tensor) -> Tensor | None:
        seen.append(value)
        return function(value) if len(seen) == 1 else None

    return changed


@pytest.mark.parametrize("family", MODELS)
def test_writes_are_those_of_raw_hooks(family: str) -> None:
    """One by one, in the second block of each stack and behind the tower: the logits that a raw hook's write gives."""
    raw = miniature(family)
    inputs = miniature_inputs(raw, family=family)
    table = MODELS[family].places()
    model = HookedMM(raw, check=False)
    parts = (
        "hook_attn_out",
        "hook_mixer_out",
        "hook_mlp_out",
        "hook_resid_post",
        "attn.hook_z",
        "mlp.hook_post",
        "mlp.hook_pre",
    )
    names = [f"{stack}blocks.1.{part}" for stack in ("vision.", "") for part in parts]
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = raw(**inputs).logits[keep]
        for name in (*names, "projector.hook_out", "ln_final.hook_out"):
            if name not in table:
                continue
            with raw_hook(raw, table[name], first_only(shift)):
                expected = raw(**inputs).logits[keep]
            got = model.run_with_hooks(inputs, fwd_hooks=[(name, lambda value, hook: shift(value))])[keep]
            assert (expected - plain).abs().max() > 1e-4, name
            assert close(got, expected) < 1e-5, name


def test_every_architecture_has_a_table() -> None:
    assert set(MODELS) == {*mixed_tower.RECIPES, *mixed_tower_ocr.RECIPES}
