"""Planted lies in gates, fused pairs, mixers and several streams: each must fail the check, and be named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hooked_mm.access import ModuleValue
from hooked_mm.views import Half
from tests.lies import Change, Distorted, change_block, lying, report_of, swap_parts

LAYERS = "model.language_model.layers."


def block(layer: int, **parts: Any) -> Change:
    """Another description of one block of the decoder."""
    return change_block("text", layer, lambda old: replace(old, **parts))


# what is wrong -> (family, the wrong structure, points that are named)
STRUCTURES: dict[str, tuple[str, Change, str]] = {
    "a gate taken for a query": ("qwen3_5", block(1, gated_q=False), "blocks.1.attn.hook_q"),
    "the other mix": ("qwen4_exp", swap_parts("text", 1, "attn_mix", "mlp_mix"), "blocks.1.hook_resid_mid"),
    "the other mix, stacked": ("glm5_next", swap_parts("text", 1, "attn_mix", "mlp_mix"), "blocks.1.hook_resid_mid"),
    "heads of a tower that share keys": (
        "exaone4_5",
        change_block("vision", 0, lambda old: replace(old, n_kv_heads=4)),
        "vision.blocks.0.attn.hook_q",
    ),
}


@pytest.mark.parametrize("what", STRUCTURES)
def test_a_wrong_structure_is_named(what: str) -> None:
    """What was found of the model is wrong in one thing."""
    family, change, named = STRUCTURES[what]
    assert set(named.split()) <= set(report_of(lying(family, change)).failed_points())


# what is wrong -> (family, point -> its wrong access)
ACCESSES: dict[str, tuple[str, dict[str, Callable[[Any], Any]]]] = {
    "gate and up projection": (
        "glm4v",
        {
            "blocks.0.mlp.hook_pre": lambda a: replace(a, view=Half(1)),
            "blocks.0.mlp.hook_pre_linear": lambda a: replace(a, view=Half(0)),
        },
    ),
    "the mixer of another block": (
        "qwen3_5",
        {"blocks.0.hook_mixer_out": lambda a: ModuleValue(f"{LAYERS}2.linear_attn", "output")},
    ),
    "bounded neurons": ("step3p7", {"blocks.1.mlp.hook_pre": lambda a: Distorted(a, lambda v: v.clamp(max=0.5))}),
    "the middle of streams": ("qwen4_exp", {"blocks.1.hook_resid_mid": lambda a: Distorted(a, lambda v: v.flip(1))}),
    "the middle of stacked streams": (
        "glm5_next",
        {"blocks.1.hook_resid_mid": lambda a: Distorted(a, lambda v: v.flip(2))},
    ),
    "queries behind the rotary embedding": (
        "hunyuan_vl",
        {"blocks.0.attn.hook_q": lambda a: Distorted(a, lambda v: v.flip(-1))},
    ),
    "latent queries": ("kimi_k25", {"blocks.0.attn.hook_q": lambda a: Distorted(a, lambda v: v.flip(-2))}),
}


@pytest.mark.parametrize("what", ACCESSES)
def test_a_wrong_place_is_named(what: str) -> None:
    """One or two points lie at another place, or show another value."""
    family, distorted = ACCESSES[what]
    assert set(distorted) <= set(report_of(lying(family, distorted=distorted)).failed_points())
