"""What differs between architectures, as data: names of modules, factors, and what no rule finds.

To add a family: build its miniature (`miniatures`), run `hooked-mm models --check FAMILY`, and add the names that are
missing here. A family that follows transformers' conventions needs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FAMILIES = (
    *("llava", "llava_next", "llava_onevision", "idefics2", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl"),
    *("qwen3_vl", "gemma3", "internvl", "mllama", "blip-2", "florence2"),
)
"""`config.model_type` of the families whose hook points are proved by tests; others are tried and judged at load."""

_ATTENTIONS = ("self_attn", "attn", "attention", "window_attn", "channel_attn")
_CROSS = ("cross_attn", "encoder_attn")
_OUT = ("o_proj", "out_proj", "proj", "projection", "projection_layer")
_MLPS = ("mlp", "ffn")


def _inside(owners: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{owner}.{name}" for owner in owners for name in names)


# role in the block -> attribute paths it goes by, the first that exists is taken; "" is the block itself.
PART_NAMES: dict[str, tuple[str, ...]] = {
    "block": ("",),
    "conv1": ("conv1",),
    "ln1": (
        *("input_layernorm", "layer_norm1", "ln_1", "norm1", "self_attn_layer_norm", "layernorm_before"),
        "self_attn_norm",
    ),
    "attn": _ATTENTIONS,
    "q": _inside(_ATTENTIONS, ("q_proj", "q")),
    "k": _inside(_ATTENTIONS, ("k_proj", "k")),
    "v": _inside(_ATTENTIONS, ("v_proj", "v")),
    "qkv": _inside(_ATTENTIONS, ("qkv",)),
    "o": _inside(_ATTENTIONS, _OUT),
    "xattn": _CROSS,
    "xq": _inside(_CROSS, ("q_proj",)),
    "xk": _inside(_CROSS, ("k_proj",)),
    "xv": _inside(_CROSS, ("v_proj",)),
    "xo": _inside(_CROSS, _OUT),
    "lnx": ("encoder_attn_layer_norm", "cross_attn_norm"),
    "conv2": ("conv2",),
    # A block that normalises what attention *adds* calls that norm `post_attention_layernorm`, not its second.
    "ln2": (
        *("pre_feedforward_layernorm", "post_attention_layernorm", "layer_norm2", "ln_2", "norm2", "final_layer_norm"),
        "layernorm_after",
    ),
    "mlp": (*_MLPS, "fc2"),
    "mlp_gate": (*_inside(_MLPS, ("gate_proj", "fc1", "linear_fc1", "c_fc")), "fc1"),
    "mlp_up": _inside(_MLPS, ("up_proj",)),
    "mlp_down": (*_inside(_MLPS, ("down_proj", "fc2", "linear_fc2", "c_proj")), "fc2"),
    "mlp_post_norm": ("post_feedforward_layernorm",),
}
# What multiplies a module's output before it is added to the stream: (parameter, function). The first that exists.
SCALES: dict[str, tuple[tuple[str, str], ...]] = {
    "attn": (("lambda_1", "identity"), ("gate_attn", "tanh")),
    "xattn": (("cross_attn_attn_gate", "tanh"),),
    "mlp": (("lambda_2", "identity"), ("gate_ffn", "tanh"), ("cross_attn_mlp_gate", "tanh")),
}
PROJECTOR_NAMES = (
    *("multi_modal_projector", "connector", "visual.merger", "language_projection", "mm_projector", "aligner"),
    "vision_tower.merger",
)
FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
EMBED_NORM_NAMES = ("layernorm_embedding",)
LAYER_LIST_NAMES = ("layers", "encoder.layers", "encoder.layer", "blocks", "layer", "h")
# Blocks that normalise after the sum; an attribute `do_layer_norm_before` decides where there is one.
POST_NORM_BLOCKS = ("BartEncoderLayer", "BartDecoderLayer")


@dataclass(frozen=True)
class Oddity:
    """What no rule finds, for one model type. Paths are relative to the model that holds the tower.

    `vision_blocks`: lists of blocks, in order, when the tower has several; `hierarchical`: blocks of several widths
    whose stream is a map (n, d, rows, cols); `projector_out`: module and field where the image tokens are in the order
    of the picture, when the projector itself gives them in another.
    """

    vision_blocks: tuple[str, ...] = ()
    block_children: tuple[str, ...] = ()
    projector_out: tuple[str, str] | None = None


EXCEPTIONS: dict[str, Oddity] = {
    # A local and a global (gated) transformer, with a norm and tile embeddings between them.
    "mllama": Oddity(vision_blocks=("vision_model.transformer.layers", "vision_model.global_transformer.layers")),
    # DaViT: stages of blocks, each a spatial and a channel block.
    "florence2": Oddity(vision_blocks=("vision_tower.blocks.*",), block_children=("spatial_block", "channel_block")),
    # The tower works in window order; its last step puts the merged tokens back.
    "qwen2_5_vl": Oddity(projector_out=("visual", "pooler_output")),
}
