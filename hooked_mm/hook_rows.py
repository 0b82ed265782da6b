"""The hook points of a block by its wiring, as rows in execution order.

To add a point, add a row. `part` names a module of the block by the role that `resolve` found it in; the value is what
goes into it or what comes out of it, unless `kind` says how else it is reached (`access`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hooked_mm.access import Side

Kind = Literal["value", "in_place", "heads", "kv_heads", "scale", "normalized", "result", "tap", "added", "rescale"]


@dataclass(frozen=True)
class Row:
    name: str
    part: str
    side: Side
    meaning: str
    kind: Kind = "value"


def norm_rows(name: str, part: str, what: str) -> tuple[Row, ...]:
    return (
        Row(f"{name}.hook_scale", part, "output", f"{what}: its divisor (b, p, 1)", "scale"),
        Row(f"{name}.hook_normalized", part, "output", f"{what}: the quotient before the gain (b, p, d)", "normalized"),
        Row(f"{name}.hook_out", part, "output", f"{what}, after its gain (b, p, d)"),
    )


def _attention(name: str, prefix: str, whose: str) -> tuple[Row, ...]:
    return (
        Row(f"{name}.hook_q", f"{prefix}q", "output", "queries as projected (b, p, heads, d_head)", "heads"),
        Row(
            f"{name}.hook_k", f"{prefix}k", "output", f"keys as projected, {whose} (b, p, kv_heads, d_head)", "kv_heads"
        ),
        Row(f"{name}.hook_v", f"{prefix}v", "output", f"values, {whose} (b, p, kv_heads, d_head)", "kv_heads"),
        Row(f"{name}.hook_rot_q", name, "input", "queries after norm and rotary (b, p, heads, d_head)", "tap"),
        Row(f"{name}.hook_rot_k", name, "input", "keys after norm and rotary, all (b, k, kv_heads, d_head)", "tap"),
        Row(f"{name}.hook_pattern", name, "input", "attention pattern (b, heads, q, k)", "tap"),
        Row(
            f"{name}.hook_z",
            f"{prefix}o",
            "input",
            "per-head mix of values, gated if the attention has a gate (b, p, heads, d_head)",
            "heads",
        ),
        Row(f"{name}.hook_result", f"{prefix}o", "output", "per-head output (b, p, heads, d)", "result"),
    )


_START = (
    Row("hook_resid_pre", "block", "input", "residual stream before the block (b, p, d)"),
    Row("hook_conv1_out", "conv1", "output", "what a convolution adds before attention (b, p, d)"),
)
_SELF = (
    *_attention("attn", "", "its own"),
    Row("hook_attn_out", "attn", "output", "what attention adds to the stream (b, p, d)", "added"),
)
_MIXER = (
    Row(
        "hook_mixer_out",
        "mixer",
        "output",
        "what a layer without attention patterns (linear attention, convolution, state space) adds (b, p, d)",
        "added",
    ),
)
_CROSS = (
    *_attention("xattn", "x", "the image's or encoder's"),
    Row("hook_xattn_out", "xattn", "output", "what cross-attention adds to the stream (b, p, d)", "added"),
)
_MLP = (
    Row("mlp.hook_pre", "mlp_gate", "output", "what the activation function sees (b, p, d_mlp)"),
    Row("mlp.hook_pre_linear", "mlp_up", "output", "up projection of a gated MLP (b, p, d_mlp)"),
    Row("mlp.hook_post", "mlp_down", "input", "the neurons (b, p, d_mlp)"),
    Row("hook_mlp_out", "mlp", "output", "what the MLP adds to the stream (b, p, d)", "added"),
)
_MORE = (
    Row("hook_extra_out", "extra", "output", "what a third part adds behind the MLP (b, p, d)"),
    Row(
        "hook_rescale_out",
        "block",
        "output",
        "what the factor on the whole stream changes at the block's end (b, p, d)",
        "rescale",
    ),
)
_END = (Row("hook_resid_post", "block", "output", "residual stream after the block (b, p, d)"),)
_LN1, _LNX, _LN2 = (
    norm_rows(name, part, f"{which} norm")
    for name, part, which in (("ln1", "ln1", "first"), ("lnx", "lnx", "cross-attention's"), ("ln2", "ln2", "second"))
)


def _inner(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(row for row in rows if row.kind != "added")


# Fused pair of projections -> which half is which.
FUSED_PAIRS = {"mlp_gate_up": ("mlp_gate", "mlp_up"), "mlp_up_gate": ("mlp_up", "mlp_gate")}
_MID = "residual stream after attention (b, p, d)"

# In execution order. Shapes are (batch, pos, ...) in the text, (image, patch, ...) in a tower, (patches, ...) in a
# packed tower.
BLOCK_ROWS: dict[str, tuple[Row, ...]] = {
    "pre": (
        *(*_START, *_LN1, *_SELF, *_MIXER, *_LNX, *_CROSS, Row("hook_resid_mid", "mid", "input", _MID, "in_place")),
        *(
            Row("hook_conv2_out", "conv2", "output", "what a convolution adds before the MLP (b, p, d)"),
            *_LN2,
            *_MLP,
            *_MORE,
            *_END,
        ),
    ),
    "post": (
        *(*_START, *_SELF, *_LN1, *_CROSS, *_LNX, Row("hook_resid_mid", "mid_norm", "output", _MID)),
        *(*_MLP, *_LN2, *_END),
    ),
    "parallel": (*_START, *_LN1, *_SELF, *_MIXER, *_LN2, *_MLP, *_END),
    "after": (
        *(*_START, *_SELF, *_MIXER, Row("hook_resid_mid", "mid", "input", _MID, "in_place")),
        *(*_MLP, *_END),
    ),
    "single": (*_START, *_LN1, *_SELF, *_MIXER, *_MLP, *_END),
    "streams": (
        *(*_START, *_LN1, *_inner(_SELF), Row("hook_resid_mid", "mid", "input", _MID, "in_place")),
        *(*_LN2, *_inner(_MLP), *_END),
    ),
    "gated": (
        *(*_START, *_LN1, *_inner(_SELF), Row("hook_resid_mid", "mid", "input", _MID, "in_place")),
        *(*_LN2, *_inner(_MLP), *_END),
    ),
    # What is added is not known, so no point says so.
    "opaque": (*_START, *_inner(_LN1), *_inner(_SELF), *_inner(_LN2), *_inner(_MLP), *_END),
}


def as_run(rows: tuple[Row, ...], called: Mapping[str, int]) -> list[Row]:
    """Rows with queries, keys and values as they are called."""
    found = list(rows)
    for places in (
        [i for i, row in enumerate(rows) if row.part in roles and row.side == "output" and row.part in called]
        for roles in (("q", "k", "v"), ("xq", "xk", "xv"))
    ):
        for place, row in zip(places, sorted((rows[i] for i in places), key=lambda row: called[row.part]), strict=True):
            found[place] = row
    return found
