"""What differs between architectures, as data: names of modules, factors, and what no rule finds.

To add an architecture: build its miniature (a row of `hooked_mm.testing`), run `hooked-mm models --check FAMILY`, and
add the names that are missing here. One that follows transformers' conventions needs nothing; where names say nothing,
the flow of data through a block does (`flow`); what neither finds is a row of EXCEPTIONS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

FAMILIES = (
    *("llava", "llava_next", "llava_onevision", "idefics2", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl"),
    *("qwen3_vl", "gemma3", "internvl", "mllama", "blip-2", "florence2"),
)
"""`config.model_type` of the families whose hook points are proved by tests; others are tried and judged at load."""

_ATTENTIONS = (
    *("self_attention.attention", "layer.0.SelfAttention", "attention.self", "self_attn", "attn", "attention"),
    *("window_attn", "channel_attn", "self_attention"),
)
_CROSS = (
    *("cross_attn", "encoder_attn", "crossattention.self", "encoder_decoder_attention.attention"),
    "layer.1.EncDecAttention",
)
# Fused projections that hold each head's query, key and value behind each other.
FUSED_BY_HEAD = ("query_key_value",)
_OUT = ("o_proj", "out_proj", "proj", "projection", "projection_layer", "dense", "wo", "attn_out", "output", "o")
_MLPS = (*("mlp.DenseReluDense", "layer.2.DenseReluDense", "layer.1.DenseReluDense", "mlp", "ffn", "feed_forward"),)


def _inside(owners: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{owner}.{name}" for owner in owners for name in names)


# role in the block -> attribute paths it goes by, the first that exists is taken; "" is the block itself.
# `attn_add`, `xattn_add`: the module whose output is what attention adds, where it is not the attention itself.
# `attn_after`, `mlp_after`: a norm, scale or convolution that what a branch adds goes through.
# `mixer`: what stands in attention's place and has no pattern (linear attention, convolution, state space).
PART_NAMES: dict[str, tuple[str, ...]] = {
    "block": ("",),
    "conv1": ("conv1",),
    "ln1": (
        *("input_layernorm", "layer_norm1", "ln_1", "norm1", "self_attn_layer_norm", "layernorm_before"),
        *("self_attn_norm", "operator_norm", "attention_norm", "pre_attention_layer_norm", "pre_self_attn_layernorm"),
        *("rms_norm1", "attention.output.LayerNorm", "norm", "attn_norm", "self_attention.layer_norm"),
        "layer.0.layer_norm",
    ),
    "attn": _ATTENTIONS,
    "q": _inside(_ATTENTIONS, ("q_proj", "q", "query", "wq", "q_b_proj")),
    "k": _inside(_ATTENTIONS, ("k_proj", "k", "key", "wk")),
    "v": _inside(_ATTENTIONS, ("v_proj", "v", "value", "wv")),
    "qkv": (*_inside(_ATTENTIONS, ("qkv", *FUSED_BY_HEAD)), "att_proj"),
    # Latent attention: queries are projected from a normed, smaller projection.
    "q_a": _inside(_ATTENTIONS, ("q_a_proj",)),
    "q_a_norm": _inside(_ATTENTIONS, ("q_a_layernorm",)),
    "o": ("attention.output.dense", *_inside(_ATTENTIONS, _OUT), "attn_out"),
    # A norm between what the heads give and the output projection.
    "o_norm": _inside(_ATTENTIONS, ("inner_attn_ln",)),
    "attn_add": ("attention.output.dense", "attn_out"),
    "attn_after": ("post_self_attn_layernorm", "post_operator_norm", "post_norm1", "layer_scale1", "ls1", "attn_sconv"),
    "mixer": ("linear_attn", "conv", "mamba", "mixer"),
    "xattn": _CROSS,
    "xq": _inside(_CROSS, ("q_proj", "query", "q")),
    "xk": _inside(_CROSS, ("k_proj", "key", "k")),
    "xv": _inside(_CROSS, ("v_proj", "value", "v")),
    "xo": ("crossattention.output.dense", *_inside(_CROSS, _OUT)),
    "xattn_add": ("crossattention.output.dense",),
    # Where several streams run side by side, these mix them to what attention and MLP see.
    "attn_mix": ("attn_hc", "attn_hyper_connection"),
    "mlp_mix": ("ffn_hc", "mlp_hyper_connection"),
    # What adds embeddings of its own to them before attention.
    "embed_add": ("ple",),
    "lnx": (
        *("encoder_attn_layer_norm", "cross_attn_norm", "crossattention.output.LayerNorm"),
        "encoder_decoder_attention.layer_norm",
    ),
    "conv2": ("conv2",),
    # A block that normalises what attention *adds* calls that norm `post_attention_layernorm`, not its second.
    "ln2": (
        *("pre_feedforward_layernorm", "post_attention_layernorm", "layer_norm2", "ln_2", "norm2", "final_layer_norm"),
        *("layernorm_after", "ffn_norm", "ff_norm", "pre_mlp_layer_norm", "rms_norm2", "output.LayerNorm"),
        *("mlp.layer_norm", "layer.2.layer_norm", "layer.1.layer_norm"),
    ),
    "mlp": (*_MLPS, "fc2", "output.dense", "ff_out"),
    "mlp_gate": (
        *_inside(_MLPS, ("gate_proj", "fc1", "linear_fc1", "c_fc", "w1", "dense_h_to_4h", "wi_0", "wi", "lin1")),
        *("fc1", "intermediate.dense"),
    ),
    "mlp_up": _inside(_MLPS, ("up_proj", "w3", "wi_1")),
    "mlp_gate_up": _inside(_MLPS, ("gate_up_proj",)),
    # The same pair the other way round.
    "mlp_up_gate": ("ff_proj",),
    "mlp_down": (
        *_inside(_MLPS, ("down_proj", "fc2", "linear_fc2", "c_proj", "w2", "dense_4h_to_h", "wo", "lin2")),
        *("fc2", "output.dense", "ff_out"),
    ),
    # A norm between the activation function and the down projection.
    "mlp_norm": _inside(_MLPS, ("ffn_layernorm",)),
    "mlp_after": (
        "post_feedforward_layernorm",
        "post_mlp_layernorm",
        "post_ffn_norm",
        "post_norm2",
        "layer_scale2",
        "ls2",
        "mlp_sconv",
    ),
    # What joins the stream with what attention or MLP gives, where that is no sum.
    "attn_join": ("post_attention_residual_gate",),
    "mlp_join": ("post_feedforward_residual_gate",),
    # A third part, whose output is added behind the MLP (Gemma's embeddings of each layer).
    "extra": ("post_per_layer_input_norm",),
}
# Names that stand for another role where a block has both: (role it goes by alone, its role then, the other).
RENAMED = (
    ("post_attention_layernorm", "attn_after", "pre_feedforward_layernorm"),
    ("layer.1.layer_norm", "lnx", "layer.1.EncDecAttention"),
)
# What multiplies a module's output before it is added: (attribute, function). The first that exists.
SCALES: dict[str, tuple[tuple[str, str], ...]] = {
    "attn": (
        *(("lambda_1", "identity"), ("gamma_1", "identity"), ("gate_attn", "tanh")),
        ("residual_multiplier", "identity"),
    ),
    "mixer": (("residual_multiplier", "identity"),),
    "xattn": (("cross_attn_attn_gate", "tanh"), ("alpha_cross_attn", "tanh")),
    "mlp": (
        *(
            ("lambda_2", "identity"),
            ("gamma_2", "identity"),
            ("gate_ffn", "tanh"),
            ("cross_attn_mlp_gate", "tanh"),
            ("alpha_dense", "tanh"),
        ),
        ("residual_multiplier", "identity"),
    ),
}
# What multiplies the whole stream at the end of a block.
STREAM_SCALES = ("layer_scalar",)
# Arguments of a block that say which rows of a part's output are dropped -> that part.
ROW_MASKS = {"full_text_row_masked_out_mask": "mlp", "cross_attention_gate": "xattn"}
# Norms of queries and keys, and gates of heads, inside attention; `{}` stands for `q` or `k`.
QUERY_KEY_NORMS = ("{}_norm", "{}_layernorm", "{}_layer_norm", "qk_norm")
NORMS_BEHIND_ROTARY = {"q": "query_layernorm", "k": "key_layernorm"}
# Inside attention: what multiplies a query by a number that grows with its position.
QUERY_SCALES = ("softmax_scaling", "attn_temperature_tuning", "log_scaling_n_floor")
# Arguments of attention that turn queries and keys by their position.
ROTARY_ARGUMENTS = ("position_embeddings", "freqs_ci", "rope")
# What adds a number per distance to queries * keys: an argument or an attribute of attention.
SCORE_BIASES = ("position_bias", "rel_pos_h", "rel_logits_proj")
# Attributes of a decoder's attention that puts its keys behind those of the encoder.
APPENDED_KEYS = ("append_to_cache",)
# Inside attention: convolutions of projected keys and values, norms of values, and of what each head gives.
CONVOLUTIONS = ("{}_sconv",)
VALUE_NORMS = ("v_norm",)
HEAD_NORMS = ("o_norm",)
HEAD_GATES = ("g_proj", "gate_proj")
# Attributes of attention that multiply the normed latent which queries are projected from.
QUERY_LATENT_SCALES = ("q_lora_scale",)
# Attributes of an MLP that multiply what its down projection gives.
MLP_SCALES = ("global_scale",)
# Attributes of a gated MLP that bound |up|, and the gate from above: before its activation function, or after it.
CLAMPS = (("swiglu_limit", "before"), ("limit", "after"))
PROJECTOR_NAMES = (
    *("multi_modal_projector", "connector", "visual.merger", "language_projection", "mm_projector", "aligner"),
    *("vision_tower.merger", "embed_vision", "vision_model.connector", "visual_projection", "perceiver_resampler"),
    *("enc_to_dec_proj", "encoder.multi_modal_projector", "encoder.embed_patches", "encoder.embed_vision"),
)
# What attends between tower and projector: a query transformer, a pooling of patches.
POOLING_NAMES = ("qformer", "vision_backbone.image_pooling_2d")
# Towers that transformers' `get_encoder` does not know.
TOWER_NAMES = ("image_encoder",)
FINAL_NORM_NAMES = (*("norm", "final_layernorm", "final_layer_norm", "ln_f", "layer_norm"), "hyper_connection_mixer")
EMBED_NORM_NAMES = ("layernorm_embedding",)
LAYER_LIST_NAMES = ("layers", "encoder.layers", "encoder.layer", "blocks", "layer", "block", "h")
# What a configuration calls the number that logits are multiplied or divided by.
LOGIT_SCALE_NAMES = ("logit_scale", "logits_scaling", "output_multiplier", "logits_mup_width_multiplier")
# What it calls the number of words, where the unembedding is padded to more.
WORD_COUNT_NAMES = ("unpadded_vocab_size",)
# How many streams run side by side, in a configuration, and what makes one of them before the final norm.
STREAM_COUNTS = ("hc_mult", "hc_count")
COLLAPSE_NAMES = ("hc_head",)
# Where a configuration says which token stands for a patch of an image.
IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index", "video_token_index")
# Inputs that mark which positions hold image features, whatever ids stand there.
IMAGE_MASK_NAMES = ("image_embeds_position_mask",)


@dataclass(frozen=True)
class Oddity:
    """What no rule finds, for one model type. Paths are relative to the model that holds the tower.

    Attributes:
        text_blocks: Lists of the decoder's blocks, in order; `.*` at the end for a list of lists.
        vision_blocks: The same of the tower.
        block_children: Children of a tower's block that are blocks themselves.
        parts: Role (see PART_NAMES) -> path inside a decoder's block; the first of them that a block has is taken.
        vision_parts: The same of the tower's blocks.
        projector: The module from tower features to image tokens.
        projector_out: Module and field where the image tokens are in the order of the picture, when the projector
            itself gives them in another.
        image_token: What the configuration calls the token that stands for a patch of an image.
        no_generation: Why its own generation can't be run with hooks; its passes can.
        refused: Why a model of this type can't be had.
    """

    text_blocks: tuple[str, ...] = ()
    vision_blocks: tuple[str, ...] = ()
    block_children: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    vision_parts: Mapping[str, str] = field(default_factory=dict)
    projector: str | None = None
    projector_out: tuple[str, str] | None = None
    image_token: str = ""
    no_generation: str = ""
    refused: str = ""


EXCEPTIONS: dict[str, Oddity] = {
    # Between the tower and its projector stand a pooling attention and learned vectors for padding.
    "molmo": Oddity(projector="vision_backbone.image_projector", image_token="image_patch_id"),
    # A local and a global (gated) transformer, with a norm and tile embeddings between them.
    "mllama": Oddity(vision_blocks=("vision_model.transformer.layers", "vision_model.global_transformer.layers")),
    # DaViT: stages of blocks, each a spatial and a channel block.
    "florence2": Oddity(vision_blocks=("vision_tower.blocks.*",), block_children=("spatial_block", "channel_block")),
    # The merger runs once per image; the tower's result holds the tokens of all.
    "hunyuan_vl": Oddity(projector_out=("vision_tower", "pooler_output")),
    "blip": Oddity(
        no_generation="its `generate` leaves the last token of every prompt out: positions are not the batch's"
    ),
    "diffusion_gemma": Oddity(no_generation="it writes a block of tokens at once and mends them in steps of its own"),
    # Attention over depth (Inkling 2): the stream begins anew every few blocks.
    "inkling2": Oddity(
        refused="every block reads a mixture of what groups of earlier blocks have summed up, chosen by attention over "
        "depth, so it has no residual stream"
    ),
}
