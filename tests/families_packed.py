"""Hook name -> place in the transformers model, for the packed towers, written down by reading transformers' files.

The same machinery as `tests.families`: nothing here comes from `hooked_mm.structure`.
"""

from __future__ import annotations

from tests.families import Place, fused, neurons

Rows = dict[str, Place]
Blocks = list[tuple[str, Rows]]


def _rows(first: str, second: str, attn: str, mlp: str, added: tuple[str, str] = ("", "")) -> Rows:
    """Streams, norms and what is added; `added`: norms behind attention and MLP, where they are what is added."""
    return {
        "hook_resid_pre": Place("", "input"),
        "ln1.hook_out": Place(first),
        "hook_attn_out": Place(added[0] or attn),
        "hook_resid_mid": Place(second, "input", in_place=True),
        "ln2.hook_out": Place(second),
        "hook_mlp_out": Place(added[1] or mlp),
        "hook_resid_post": Place(""),
    }


def _heads(path: str, out: str, heads: int = 4, kv: int = 4, names: str = "{}_proj") -> Rows:
    """Separate projections of queries, keys and values."""
    many = {"q": heads, "k": kv, "v": kv}
    found = {f"attn.hook_{x}": Place(f"{path}.{names.format(x)}", view=f"heads {n}") for x, n in many.items()}
    return {**found, "attn.hook_z": Place(f"{path}.{out}", "input", f"heads {heads}")}


_GATED = neurons("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
_PLAIN = neurons("mlp.fc1", "mlp.fc2")
_DECODER = _rows("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")
_HEADS = _heads("self_attn", "o_proj", 4, 2)
_SPARSE = {**_DECODER, **_HEADS}
_LLAMA = {**_SPARSE, **_GATED}
_SANDWICH = {
    **_HEADS,
    **_rows(
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn",
        "mlp",
        ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    "mlp.hook_post": Place("mlp.down_proj", "input"),
}
# No norm stands before attention and MLP; what is added is normed.
_EXAONE = {
    **_HEADS,
    **_GATED,
    "hook_resid_pre": Place("", "input"),
    "hook_attn_out": Place("post_attention_layernorm"),
    "hook_resid_mid": Place("mlp", "input", in_place=True),
    "hook_mlp_out": Place("post_feedforward_layernorm"),
    "hook_resid_post": Place(""),
}
_LINEAR = {
    **{name: place for name, place in _DECODER.items() if name != "hook_attn_out"},
    "hook_mixer_out": Place("linear_attn"),
}
# Streams beside each other: norms stand on what is mixed of them, which is no stream.
_HYPER = {
    "hook_resid_pre": Place("", "input"),
    "hook_resid_mid": Place("ffn_hc", "input", in_place=True),
    "hook_resid_post": Place(""),
}
_GATED_STREAMS = {**_HYPER, "hook_resid_mid": Place("mlp_hyper_connection", "input", in_place=True)}

_SIGLIP = {
    **_rows("layer_norm1", "layer_norm2", "self_attn", "mlp"),
    **_heads("self_attn", "out_proj"),
    **_PLAIN,
}
_QWEN = {**_rows("norm1", "norm2", "attn", "mlp"), **fused("attn", "proj")}
_QWEN2 = {**_QWEN, **_PLAIN}
_QWEN2_5 = {**_QWEN, **_GATED}
_QWEN3 = {**_QWEN, **neurons("mlp.linear_fc1", "mlp.linear_fc2")}
_OMNI = {**_QWEN2_5, **_heads("attn", "proj", names="{}")}
_KIMI = {**_QWEN2, **_heads("attn", "proj")}
_STEP = {
    **_rows("layernorm_before", "layernorm_after", "self_attn", "mlp"),
    **_heads("self_attn", "out_proj"),
    **_PLAIN,
    "hook_attn_out": Place("self_attn", factor="lambda_1"),
    "hook_mlp_out": Place("mlp", factor="lambda_2"),
}
_GROUPED = {
    name: place for name, place in _QWEN2_5.items() if name not in ("attn.hook_q", "attn.hook_k", "attn.hook_v")
}


def _without(rows: Rows, *starts: str) -> Rows:
    return {name: place for name, place in rows.items() if not name.startswith(starts)}


_DECODER_PATH = "model.language_model.layers"


def _many(path: str, *kinds: Rows) -> Blocks:
    return [(f"{path}.{index}", rows) for index, rows in enumerate(kinds)]


# Dense and sparse layers as the miniatures have them.
_FIRST_DENSE = _many(_DECODER_PATH, _LLAMA, _LLAMA, _SPARSE, _SPARSE)
_EVERY_OTHER = _many(_DECODER_PATH, _LLAMA, _SPARSE, _LLAMA, _SPARSE)
# Queries share their projection with a gate, latent attention has no key projection: only what all have.
_FULL = _without(_DECODER, "attn.")
_LATENT = _without(_DECODER, "attn.")
_DENSE = {**_LATENT, **_GATED}
_ALL = _many(_DECODER_PATH, *[_LLAMA] * 4)
_GLM = _many(_DECODER_PATH, *[_SANDWICH] * 4)

TEXT: dict[str, Blocks] = {
    "cosmos3_edge": _many(_DECODER_PATH, *[{**_SPARSE, **_PLAIN}] * 4),
    "cosmos3_omni": _ALL,
    "ernie4_5_vl_moe": _FIRST_DENSE,
    "exaone4_5": _many(_DECODER_PATH, *[_EXAONE] * 4),
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _FIRST_DENSE,
    "glm5_next": _many(_DECODER_PATH, *[_HYPER] * 4),
    "glm_ocr": _GLM,
    "glmga": _GLM,
    "hunyuan_vl": _ALL,
    "kimi_k25": _many(_DECODER_PATH, _DENSE, _DENSE, _LATENT, _LATENT),
    "paddleocr_vl": _ALL,
    "qwen2_5_omni_thinker": _ALL,
    "qwen3_5": _many(_DECODER_PATH, *[{**_LINEAR, **_GATED}, {**_FULL, **_GATED}] * 2),
    "qwen3_5_moe": _many(_DECODER_PATH, *[_LINEAR, _FULL] * 2),
    "qwen3_omni_moe_thinker": _EVERY_OTHER,
    "qwen3_vl_moe": _EVERY_OTHER,
    "qwen4_exp": _many(_DECODER_PATH, *[_GATED_STREAMS] * 4),
    "step3p7": _many(_DECODER_PATH, *[{**_FULL, **_GATED}] * 2, *[_FULL] * 2),
    "video_llama_3": _ALL,
}
"""Architecture -> the decoder's blocks."""


def _tower(path: str, rows: Rows) -> Blocks:
    return _many(path, *[rows] * 3)


_VISUAL = "model.visual.blocks"
TOWER: dict[str, Blocks] = {
    "cosmos3_edge": _tower("model.visual.encoder.layers", _SIGLIP),
    "cosmos3_omni": _tower(_VISUAL, _QWEN3),
    "ernie4_5_vl_moe": _tower("model.vision_tower.blocks", _QWEN2),
    "exaone4_5": _tower(_VISUAL, _GROUPED),
    "glm46v": _tower(_VISUAL, _QWEN2_5),
    "glm4v": _tower(_VISUAL, _QWEN2_5),
    "glm4v_moe": _tower(_VISUAL, _QWEN2_5),
    "glm5_next": _tower(_VISUAL, _QWEN2_5),
    "glm_ocr": _tower(_VISUAL, _QWEN2_5),
    "glmga": _tower(_VISUAL, _QWEN2_5),
    "hunyuan_vl": _tower("model.vision_tower.layers", {**_SIGLIP, **_heads("self_attn", "o_proj")}),
    "kimi_k25": _tower("model.vision_tower.layers", _KIMI),
    "paddleocr_vl": _tower("model.visual.vision_model.encoder.layers", _SIGLIP),
    "qwen2_5_omni_thinker": _tower(_VISUAL, _OMNI),
    "qwen3_5": _tower(_VISUAL, _QWEN3),
    "qwen3_5_moe": _tower(_VISUAL, _QWEN3),
    "qwen3_omni_moe_thinker": _tower(_VISUAL, _QWEN3),
    "qwen3_vl_moe": _tower(_VISUAL, _QWEN3),
    "qwen4_exp": _tower(_VISUAL, _QWEN3),
    "step3p7": _tower("model.vision_model.layers", _STEP),
    "video_llama_3": _tower("model.vision_model.encoder.layers", _SIGLIP),
}
"""Architecture -> the tower's blocks."""
FAMILIES = tuple(TEXT)
_MERGER = {
    "projector.hook_in": Place("model.visual.merger", "input"),
    "projector.hook_out": Place("model.visual.merger"),
}
# The merger works in window order; the tower's result is in the picture's.
_WINDOWS = {**_MERGER, "projector.hook_out": Place("model.visual", "pooler_output")}
_NAMES = {
    "cosmos3_edge": "model.projector",
    "ernie4_5_vl_moe": "model.resampler_model",
    "kimi_k25": "model.mm_projector",
    "paddleocr_vl": "model.projector",
    "step3p7": "model.multi_modal_projector",
    "video_llama_3": "model.projector",
}
PROJECTOR: dict[str, Rows] = {
    **dict.fromkeys(FAMILIES, _MERGER),
    **dict.fromkeys(("exaone4_5", "qwen2_5_omni_thinker"), _WINDOWS),
    **{
        family: {"projector.hook_in": Place(path, "input"), "projector.hook_out": Place(path)}
        for family, path in _NAMES.items()
    },
    # Called once per image; the tower's result holds all of them.
    "hunyuan_vl": {"projector.hook_out": Place("model.vision_tower", "pooler_output")},
}
"""Architecture -> what goes into the projector, and the image tokens in the picture's order."""
NORM = {
    **dict.fromkeys(FAMILIES, "model.language_model.norm"),
    "qwen4_exp": "model.language_model.hyper_connection_mixer",
}


def _stack(prefix: str, blocks: Blocks) -> Rows:
    found: Rows = {}
    for layer, (path, rows) in enumerate(blocks):
        for name, row in rows.items():
            inside = f"{path}.{row.path}" if row.path else path
            factor = f"{path}.{row.factor}" if row.factor else ""
            found[f"{prefix}blocks.{layer}.{name}"] = Place(inside, row.side, row.view, row.in_place, factor)
    found[f"{prefix}hook_embed"] = found[f"{prefix}blocks.0.hook_resid_pre"]
    return found


def places(family: str) -> Rows:
    """Hook name -> place."""
    return {
        **_stack("vision.", TOWER[family]),
        **PROJECTOR[family],
        **_stack("", TEXT[family]),
        "ln_final.hook_out": Place(NORM[family]),
        "hook_logits": Place("", "logits"),
    }
