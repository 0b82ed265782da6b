"""The list of hook points, as data: what each is called, on which side of which module it lies, what it means.

To add a point, add a row. `{l}` stands for the layer. `part` names a module of the block (or of the model) by the
role that `structure` resolved it to; the value is what goes into it or what comes out of it.

A write at the *input* of a norm would miss the residual stream, which the block keeps beside the norm: such points
are written in place (`in_place`), into the one tensor that both read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hooked_mm.structure import Stack, Structure

Side = Literal["input", "output"]
Stream = Literal["text", "vision", "projector"]


@dataclass(frozen=True)
class HookPoint:
    """One place in one model where a value can be read and written.

    `module`: path of the module in the transformers model; `heads`: the last dimension is split into that many heads;
    `layer`: the block's index, None outside blocks.
    """

    name: str
    module: str
    side: Side
    stream: Stream
    layer: int | None
    meaning: str
    heads: int | None = None
    in_place: bool = False


@dataclass(frozen=True)
class _Row:
    name: str
    part: str
    side: Side
    meaning: str
    heads: Literal["n_heads", "n_kv_heads"] | None = None
    in_place: bool = False


# In execution order within a block; shapes are (batch, pos, ...), in the vision tower (image, patch, ...).
BLOCK_ROWS: tuple[_Row, ...] = (
    _Row("hook_resid_pre", "block", "input", "residual stream before the block (b, p, d)"),
    _Row("ln1.hook_out", "ln1", "output", "first norm, after its gain (b, p, d)"),
    _Row("attn.hook_q", "q", "output", "queries before rotary (b, p, heads, d_head)", "n_heads"),
    _Row("attn.hook_k", "k", "output", "keys before rotary (b, p, kv_heads, d_head)", "n_kv_heads"),
    _Row("attn.hook_v", "v", "output", "values (b, p, kv_heads, d_head)", "n_kv_heads"),
    _Row("attn.hook_z", "o", "input", "per-head mix of values (b, p, heads, d_head)", "n_heads"),
    _Row("hook_attn_out", "attn", "output", "what attention adds to the stream (b, p, d)"),
    _Row("hook_resid_mid", "ln2", "input", "residual stream after attention (b, p, d)", in_place=True),
    _Row("ln2.hook_out", "ln2", "output", "second norm, after its gain (b, p, d)"),
    _Row("mlp.hook_pre", "mlp_gate", "output", "what the activation function sees (b, p, d_mlp)"),
    _Row("mlp.hook_pre_linear", "mlp_up", "output", "up projection of a gated MLP (b, p, d_mlp)"),
    _Row("mlp.hook_post", "mlp_down", "input", "the neurons (b, p, d_mlp)"),
    _Row("hook_mlp_out", "mlp", "output", "what the MLP adds to the stream (b, p, d)"),
    _Row("hook_resid_post", "block", "output", "residual stream after the block (b, p, d)"),
)


def _block_points(prefix: str, stream: Stream, stack: Stack) -> list[HookPoint]:
    points = []
    for layer in range(stack.n_layers):
        for row in BLOCK_ROWS:
            part = stack.parts.get(row.part)
            # q and k of a gate-less or fused block, say, do not exist: a point that cannot fire is not listed.
            if part is None:
                continue
            path = f"{stack.layers}.{layer}" + (f".{part}" if part else "")
            name = f"{prefix}blocks.{layer}.{row.name}"
            heads = getattr(stack, row.heads) if row.heads else None
            points.append(HookPoint(name, path, row.side, stream, layer, row.meaning, heads, row.in_place))
    return points


def list_hook_points(structure: Structure) -> dict[str, HookPoint]:
    """Every hook point of a model by name, in execution order."""
    points: list[HookPoint] = []
    if vision := structure.vision:
        first = f"{vision.layers}.0"
        points.append(
            HookPoint("vision.hook_embed", first, "input", "vision", None, "what enters tower block 0 (n, p, d)")
        )
        points += _block_points("vision.", "vision", vision)
    if path := structure.projector:
        points.append(
            HookPoint("projector.hook_in", path, "input", "projector", None, "selected patch features (n, p, d)")
        )
        points.append(
            HookPoint("projector.hook_out", path, "output", "projector", None, "image tokens (n, p, d_model)")
        )
    text = structure.text
    first = f"{text.layers}.0"
    points.append(
        HookPoint("hook_embed", first, "input", "text", None, "embeddings with image features merged in (b, p, d)")
    )
    points += _block_points("", "text", text)
    points.append(
        HookPoint(
            "ln_final.hook_out", structure.final_norm, "output", "text", None, "final norm, after its gain (b, p, d)"
        )
    )
    points.append(HookPoint("hook_logits", structure.unembed, "output", "text", None, "logits (b, p, vocab)"))
    return {point.name: point for point in points}
