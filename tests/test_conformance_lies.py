"""Planted lies: each must fail the check, and the point that lies must be named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch

from hooked_mm.access import ModuleValue
from hooked_mm.views import Fused
from tests.lies import (
    Change,
    Distorted,
    change_block,
    change_parts,
    lying,
    report_of,
    swap_blocks,
    swap_parts,
)

LAYERS = "model.language_model.layers."


def overall(**parts: Any) -> Change:
    """Another description of what is outside blocks."""
    return lambda structure: replace(structure, **parts)


def block(stream: str, layer: int, **parts: Any) -> Change:
    """Another description of one block."""
    return change_block(stream, layer, lambda old: replace(old, **parts))


def scales(stream: str, layer: int, **rows: tuple[str, str]) -> Change:
    """Other factors in front of what one block adds."""
    return block(stream, layer, scales=MappingProxyType(rows))


def at(module: str, side: Any) -> Callable[[Any], Any]:
    """A point at another module."""
    return lambda access: ModuleValue(module, side)


def formula(**parts: Any) -> Callable[[Any], Any]:
    """A norm with another formula."""
    return lambda access: replace(access, formula=replace(access.formula, **parts))


UNPACKED: Change = lambda s: replace(s, vision=replace(s.vision, packed=False))  # noqa: E731
XGATE, XMLP = ("cross_attn_attn_gate", "tanh"), ("cross_attn_mlp_gate", "tanh")

# what is wrong -> (family, the wrong structure, points that are named)
STRUCTURES: dict[str, tuple[str, Change, str]] = {
    "first and second norm": ("llava", swap_parts("text", 0, "ln1", "ln2"), "blocks.0.ln1.hook_out"),
    "first and second norm, tower": ("llava", swap_parts("vision", 0, "ln1", "ln2"), "vision.blocks.0.ln2.hook_out"),
    "layer scale of attention": (
        "internvl",
        scales("vision", 0, mlp=("lambda_2", "identity")),
        "vision.blocks.0.hook_attn_out",
    ),
    "layer scale of the MLP": (
        "internvl",
        scales("vision", 0, attn=("lambda_1", "identity")),
        "vision.blocks.0.hook_mlp_out",
    ),
    "each other's layer scale": (
        "internvl",
        scales("vision", 2, attn=("lambda_2", "identity"), mlp=("lambda_1", "identity")),
        "vision.blocks.2.hook_attn_out vision.blocks.2.hook_mlp_out",
    ),
    "gate dropped": ("mllama", scales("text", 1, mlp=XMLP), "blocks.1.hook_xattn_out"),
    "gate without tanh": (
        "mllama",
        scales("text", 1, xattn=("cross_attn_attn_gate", "identity"), mlp=XMLP),
        "blocks.1.hook_xattn_out",
    ),
    "gate of the MLP without tanh": (
        "mllama",
        scales("text", 1, xattn=XGATE, mlp=("cross_attn_mlp_gate", "identity")),
        "blocks.1.hook_mlp_out",
    ),
    "rows that are dropped": ("mllama", block("text", 1, row_mask=False), "blocks.1.hook_mlp_out"),
    "insertion in the tower": ("mllama", block("vision", 2, inserted=False), "vision.blocks.3.hook_resid_pre"),
    "norm behind attention": ("gemma3", change_parts("text", 0, attn_after=None), "blocks.0.hook_attn_out"),
    "norm behind the MLP": ("gemma3", change_parts("text", 1, mlp_after=None), "blocks.1.hook_mlp_out"),
    "final norm": ("llava", overall(final_norm=f"{LAYERS}3.post_attention_layernorm"), "ln_final.hook_out hook_logits"),
    "logit scale": ("llava", overall(logit_scale=2.0), "hook_logits"),
    "soft-cap": ("llava", overall(logit_cap=30.0), "hook_logits"),
    "image token": ("llava", overall(image_token_id=1), "hook_embed projector.hook_out"),
    "queries and keys": (
        "llava",
        swap_parts("vision", 0, "q", "k"),
        "vision.blocks.0.attn.hook_q vision.blocks.0.attn.hook_k",
    ),
    "keys and values": ("llava", swap_parts("text", 0, "k", "v"), "blocks.0.attn.hook_k blocks.0.attn.hook_v"),
    "keys and values of the image": (
        "mllama",
        swap_parts("text", 1, "xk", "xv"),
        "blocks.1.xattn.hook_k blocks.1.xattn.hook_v",
    ),
    "heads": ("llava", block("text", 0, n_heads=8), "blocks.0.attn.hook_z"),
    "heads, tower": ("llava", block("vision", 0, n_heads=8, n_kv_heads=8), "vision.blocks.0.attn.hook_z"),
    "groups of heads": ("llava", block("text", 0, n_kv_heads=4), "blocks.0.attn.hook_k blocks.0.attn.hook_v"),
    "gate and up": (
        "llava",
        swap_parts("text", 0, "mlp_gate", "mlp_up"),
        "blocks.0.mlp.hook_pre blocks.0.mlp.hook_pre_linear",
    ),
    "order of the tower": (
        "llava",
        swap_blocks("vision", 0, 1),
        "vision.blocks.1.hook_resid_pre",
    ),
    "order of the decoder": ("llava", swap_blocks("text", 1, 2), "blocks.1.hook_resid_post blocks.2.hook_resid_post"),
    "half a projector": ("llava", overall(projector="model.multi_modal_projector.linear_1"), "projector.hook_out"),
    "the other half": ("llava", overall(projector="model.multi_modal_projector.linear_2"), "projector.hook_in"),
    "window order": ("qwen2_5_vl", overall(projector_out=None), "projector.hook_out"),
    "deepstack forgotten": ("qwen3_vl", block("text", 0, inserted=False), "blocks.1.hook_resid_pre"),
    "deepstack invented": ("qwen3_vl", block("text", 2, inserted=True), "blocks.2.hook_insert_out"),
    "norms behind the sum": ("florence2", block("encoder", 0, wiring="pre"), "encoder.blocks.0.ln1.hook_out"),
    "norms before the sum": ("llava", block("text", 0, wiring="post"), "blocks.0.ln1.hook_out blocks.0.hook_resid_mid"),
    "convolutions": ("florence2", swap_parts("vision", 0, "conv1", "conv2"), "vision.blocks.0.hook_conv1_out"),
    "packed tower": ("qwen2_vl", UNPACKED, "vision.blocks.0.attn.hook_z"),
    "rotary forgotten": ("llava", block("text", 0, rotary=False), "blocks.0.attn.hook_q blocks.0.attn.hook_k"),
}


def of_cheap_families(rows: dict[str, Any]) -> list[Any]:
    """The names of lies; those of families with many points are told on the slow run."""
    large = ("mllama", "gemma3", "florence2", "qwen3_vl")
    return [pytest.param(what, marks=[pytest.mark.slow] * (rows[what][0] in large)) for what in rows]


@pytest.mark.parametrize("what", of_cheap_families(STRUCTURES))
def test_a_wrong_structure_is_named(what: str) -> None:
    """What was found of the model is wrong in one thing."""
    family, change, named = STRUCTURES[what]
    assert set(named.split()) <= set(report_of(lying(family, change)).failed_points())


B0 = "blocks.0."
# what is wrong -> (family, point -> its wrong access)
ACCESSES: dict[str, tuple[str, dict[str, Callable[[Any], Any]]]] = {
    "embedding of another block": ("llava", {"hook_embed": at(f"{LAYERS}1", "input")}),
    "z behind the projection": ("llava", {"blocks.0.attn.hook_z": lambda a: replace(a, side="output")}),
    "z of other heads": ("llava", {"blocks.0.attn.hook_z": lambda a: Distorted(a, lambda v: v.flip(-2))}),
    "results of other heads": ("llava", {"blocks.0.attn.hook_result": lambda a: Distorted(a, lambda v: v.flip(-2))}),
    "attention of another block": ("llava", {"blocks.0.hook_attn_out": at(f"{LAYERS}1.self_attn.o_proj", "output")}),
    "neurons at the gate": ("llava", {"blocks.0.mlp.hook_post": at(f"{LAYERS}0.mlp.gate_proj", "output")}),
    "the middle beside the stream": ("llava", {"blocks.0.hook_resid_mid": lambda a: replace(a, in_place=False)}),
    "the projector's second half": (
        "llava",
        {"projector.hook_in": at("model.multi_modal_projector.linear_2", "input")},
    ),
    "order of the fused": (
        "qwen2_vl",
        {
            "vision.blocks.0.attn.hook_k": lambda a: replace(a, view=Fused(2, 4, 4)),
            "vision.blocks.0.attn.hook_v": lambda a: replace(a, view=Fused(1, 4, 4)),
        },
    ),
    "order of the fused, no rotary": (
        "florence2",
        {
            "vision.blocks.0.attn.hook_q": lambda a: replace(a, view=Fused(1, 2, 2)),
            "vision.blocks.0.attn.hook_k": lambda a: replace(a, view=Fused(0, 2, 2)),
        },
    ),
    "reading that changes": ("llava", {"blocks.0.hook_mlp_out": lambda a: Distorted(a, before=lambda v: v * 1.001)}),
    "a pattern without a mask": (
        "llava",
        {"blocks.0.attn.hook_pattern": lambda a: Distorted(a, before=lambda v: torch.full_like(v, 1 / v.shape[-1]))},
    ),
    "eps": ("llava", {"blocks.0.ln1.hook_scale": formula(eps=0.5), "blocks.0.ln1.hook_normalized": formula(eps=0.5)}),
    "centring": ("llava", {"blocks.0.ln1.hook_normalized": formula(centred=True)}),
    "eps of the final norm": (
        "llava",
        {"ln_final.hook_scale": formula(eps=0.5), "ln_final.hook_normalized": formula(eps=0.5)},
    ),
    "gain": ("gemma3", {"blocks.0.ln1.hook_normalized": formula(gain_offset=0.0)}),
    "channels of queries": ("llava", {"blocks.0.attn.hook_q": lambda a: Distorted(a, lambda v: v.flip(-1))}),
    "channels of rotated keys": ("llava", {"blocks.0.attn.hook_rot_k": lambda a: Distorted(a, lambda v: v.flip(-1))}),
    "logits": ("llava", {"hook_logits": lambda a: Distorted(a, lambda v: v - v.mean(-1, keepdim=True))}),
}


@pytest.mark.parametrize("what", of_cheap_families(ACCESSES))
def test_a_wrong_place_is_named(what: str) -> None:
    """One or two points lie at another place, or show or write another value."""
    family, distorted = ACCESSES[what]
    assert set(distorted) <= set(report_of(lying(family, distorted=distorted)).failed_points())
