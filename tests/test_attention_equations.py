"""The equations of attention of every kind: gates, norms of queries and keys, latents, fused projections, biases.

An honest block's hold; whatever value is turned round, one of them fails.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from hooked_mm.attention_equations import AttentionEquations
from hooked_mm.checks import Check
from hooked_mm.equations import BlockEquations
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs

# Kind -> (architecture, the block whose attention is of it).
KINDS = {
    "gated queries": ("qwen3_5", 3),
    "norms of whole queries and keys": ("chameleon", 1),
    "grouped heads": ("llava", 0),
    "norms of heads": ("muse_glimmer", 1),
    "norms behind only": ("exaone4_5", 0),
    "fused projections": ("fuyu", 0),
    "latents": ("kimi_k25", 1),
    "gates of heads": ("step3p7", 0),
    "norm before the output": ("kosmos-2", 1),
    "distance in the scores": ("pix2struct", 0),
}


@functools.cache
def block_of(kind: str) -> tuple[HookedMM, int, dict[str, Tensor], Tensor]:
    """A model, a block of it, all values there of one pass, and which positions are real."""
    family, layer = KINDS[kind]
    model = HookedMM(miniature(family), check=False)
    _, cache = model.run_with_cache(miniature_inputs(model.hf_model, 2, family=family), f"blocks.{layer}.*")
    real = (cache.batch if cache.batch.decoder is None else cache.batch.decoder).mask()
    return model, layer, dict(cache), real


def checks(kind: str, values: dict[str, Tensor]) -> list[Check]:
    """Every equation of that block."""
    model, layer, _, real = block_of(kind)
    block = model.structure.text.blocks[layer]
    return list(BlockEquations(values, model.hf_model, block, f"blocks.{layer}.", real).all())


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_block_holds(kind: str) -> None:
    """And something is said of z, and of what attention reads."""
    found = checks(kind, block_of(kind)[2])
    assert not [check for check in found if check.verdict == "fails"]
    held = {check.what for check in found if check.verdict == "holds"}
    assert "rows of attention sum to 1" in held
    assert {"z through the output projection == result", "norm and projection of z == what is added"} & held


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_can_be_another(kind: str) -> None:
    """Each point of attention turned round over the samples: some equation fails, at a point of this attention."""
    _, layer, values, _ = block_of(kind)
    names = [name for name in values if name.startswith(f"blocks.{layer}.attn.")]
    assert len(names) >= 4
    for name in names:
        lie = {**values, name: values[name].flip(0) * 1.5}
        failed = {check.point for check in checks(kind, lie) if check.verdict == "fails"}
        assert any(point.startswith((f"blocks.{layer}.attn.", f"blocks.{layer}.hook_attn")) for point in failed), name


def test_only_values_of_this_block_are_looked_at() -> None:
    """Points are asked for by their name in the block; one that the block lacks is None."""
    model, layer, values, real = block_of("grouped heads")
    block = model.structure.text.blocks[layer]
    made = AttentionEquations(values, model.hf_model, block, f"blocks.{layer}.", real)
    assert torch.equal(made.get("attn.hook_q"), values["blocks.0.attn.hook_q"])
    assert made.get("xattn.hook_q") is None
