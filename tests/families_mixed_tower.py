"""Where the hook points of architectures with several towers, experts or state spaces lie, by hand.

From transformers' modeling files; rows and hooks as in `tests.families`; no path here comes from our own code.
"""

from __future__ import annotations

from tests.families import Place, fused, neurons, stream
from tests.families_single_tower import Model, Rows


def _added(attn: str, mlp: str, attn_by: str = "", mlp_by: str = "") -> Rows:
    return {"hook_attn_out": Place(attn, factor=attn_by), "hook_mlp_out": Place(mlp, factor=mlp_by)}


def _heads(path: str, out: str, kv: int = 4, letters: str = "qkv") -> Rows:
    found = {f"attn.hook_{x}": Place(f"{path}.{x}_proj", view=f"heads {4 if x == 'q' else kv}") for x in letters}
    return {**found, "attn.hook_z": Place(f"{path}.{out}", "input", "heads 4")}


_GATED = neurons("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
_NORMS = stream("input_layernorm", "post_attention_layernorm")
# Experts have no neurons of their own that are there for every token.
_EXPERTS = {**_NORMS, **_added("self_attn", "mlp"), **_heads("self_attn", "o_proj", 2)}
_LLAMA = {**_EXPERTS, **_GATED}
_PERI = {**_LLAMA, **_added("post_norm1", "post_norm2", "residual_multiplier", "residual_multiplier")}
_LATENT = {
    **_NORMS,
    **_added("self_attn", "mlp"),
    "attn.hook_q": Place("self_attn.q_b_proj", view="heads 4"),
    "attn.hook_z": Place("self_attn.o_proj", "input", "heads 4"),
}
# Layers of a window have half as many heads.
_WINDOW = {
    **_LATENT,
    "attn.hook_q": Place("self_attn.q_b_proj", view="heads 2"),
    "attn.hook_z": Place("self_attn.o_proj", "input", "heads 2"),
}
_DELTA = {**_NORMS, "hook_mixer_out": Place("linear_attn"), "hook_mlp_out": Place("mlp"), **_GATED}
_GATED_ATTENTION = {**_LLAMA, "attn.hook_q": Place("self_attn.q_proj", view="gated 4")}
# Gate and up projection are one map.
_PAIR = {
    "mlp.hook_pre": Place("mlp.gate_up_proj", view="half 0"),
    "mlp.hook_pre_linear": Place("mlp.gate_up_proj", view="half 1"),
    "mlp.hook_post": Place("mlp.down_proj", "input"),
}
_VIT = {
    **stream("layer_norm1", "layer_norm2"),
    **_added("self_attn", "mlp"),
    **_heads("self_attn", "out_proj"),
    **neurons("mlp.fc1", "mlp.fc2"),
}
_DOTS = {**stream("norm1", "norm2"), **_added("attn", "mlp"), **fused("attn", "proj")}
_RADIO = {
    **stream("norm1", "norm2"),
    **_added("layer_scale1", "layer_scale2"),
    **_heads("attention", "o_proj"),
    **neurons("mlp.fc1", "mlp.fc2"),
}
_OVIS = {
    **stream("rms_norm1", "rms_norm2"),
    **_added("attention", "ffn"),
    **_heads("attention", "out_proj"),
    **neurons("ffn.gate_proj", "ffn.down_proj", "ffn.up_proj"),
}
_QIANFAN = {
    **stream("layernorm_before", "layernorm_after"),
    **_added("attention", "mlp", "lambda_1", "lambda_2"),
    **_heads("attention", "projection_layer"),
    **neurons("mlp.fc1", "mlp.fc2"),
}
# One mixer per block: a state space, experts, attention or an MLP.
_MIXER = {
    "hook_resid_pre": Place("", "input"),
    "ln1.hook_out": Place("norm"),
    "hook_resid_post": Place(""),
}
_NEMOTRON = [
    {**_MIXER, "hook_mixer_out": Place("mixer")},
    {**_MIXER, "hook_mlp_out": Place("mixer")},
    {**_MIXER, "hook_attn_out": Place("mixer"), **_heads("mixer", "o_proj", 2)},
    {**_MIXER, "hook_mlp_out": Place("mixer"), **neurons("mixer.up_proj", "mixer.down_proj")},
]

_LAYERS = "model.language_model.layers"
_TEXT = (_LAYERS, [_LLAMA] * 4)
_TWO_DENSE = (_LAYERS, [_LLAMA] * 2 + [_EXPERTS] * 2)
_SIGLIP = ("model.vision_model.encoder.layers", [_VIT] * 3)
_MINICPM = Model(
    (_LAYERS, [_DELTA, _GATED_ATTENTION] * 2),
    ("model.vision_tower.encoder.layers", [_VIT] * 4),
    projector="model.merger",
    leaving="list",
)

MODELS: dict[str, Model] = {
    "aria": Model((_LAYERS, [_EXPERTS] * 4), ("model.vision_tower.encoder.layers", [_VIT] * 3)),
    "deepseek_vl": Model(_TEXT, _SIGLIP, projector="model.aligner"),
    "deepseek_vl_hybrid": Model(_TEXT, _SIGLIP, projector="model.aligner"),
    "dots3_note": Model(
        (_LAYERS, [{**_LATENT, **_GATED}, {**_WINDOW, **_GATED}, _LATENT, _WINDOW, _LATENT]),
        ("model.vision_tower.blocks", [{**_DOTS, **_GATED}] * 2 + [_DOTS] * 2),
        projector="model.vision_tower.merger",
    ),
    "hyperclovax_vision_v2": Model(
        (_LAYERS, [_PERI] * 4), ("model.vision_model.blocks", [{**_DOTS, **_GATED}] * 3), projector="model.projector"
    ),
    "minimax_m3_vl": Model(
        (_LAYERS, [{**_EXPERTS, **_PAIR}] * 2 + [_EXPERTS] * 2), ("model.vision_tower.layers", [_VIT] * 3)
    ),
    "nemotron_h_omni": Model(
        ("language_model.model.layers", _NEMOTRON * 2),
        ("vision_model.encoder.layer", [_RADIO] * 3),
        projector="multi_modal_projector",
        norm="language_model.model.norm_f",
    ),
    "ovis2": Model(
        _TEXT, ("model.vision_tower.transformer.encoder.layers", [_OVIS] * 3), projector="model.visual_embeddings_table"
    ),
    "deepseek_ocr2": Model(_TWO_DENSE, ("model.vision_tower.vision_encoder.layers", [_LLAMA] * 3)),
    "unlimited_ocr": Model(_TWO_DENSE, ("model.vision_tower.vision_encoder.encoder.layers", [_VIT] * 3)),
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "qianfan_ocr": Model(_TEXT, ("model.vision_tower.layers", [_QIANFAN] * 3)),
}
