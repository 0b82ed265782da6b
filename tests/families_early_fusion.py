"""Where the hook points of early fusion and of its makers' other models lie, by hand from transformers' modeling files.

Rows and hooks as in `tests.families`; no path here comes from our own code.
"""

from __future__ import annotations

from tests.families import Place, neurons

Rows = dict[str, Place]
Blocks = list[tuple[str, Rows]]


def _rows(first: str, second: str, attn: str, mlp: str) -> Rows:
    """Streams, norms, and the modules whose outputs are added."""
    return {
        "hook_resid_pre": Place("", "input"),
        "ln1.hook_out": Place(first),
        "hook_attn_out": Place(attn),
        "hook_resid_mid": Place(second, "input", in_place=True),
        "ln2.hook_out": Place(second),
        "hook_mlp_out": Place(mlp),
        "hook_resid_post": Place(""),
    }


def _heads(path: str, out: str = "o_proj", q: int = 4, kv: int = 2, letters: str = "qkv") -> Rows:
    found = {
        f"attn.hook_{letter}": Place(f"{path}.{letter}_proj", view=f"heads {q if letter == 'q' else kv}")
        for letter in letters
    }
    return {**found, "attn.hook_z": Place(f"{path}.{out}", "input", f"heads {q}")}


def _of(path: str, *rows: Rows) -> Blocks:
    return [(f"{path}.{index}", row) for index, row in enumerate(rows)]


_GATED = neurons("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
_FC = neurons("mlp.fc1", "mlp.fc2")
_SPARSE = {**_rows("input_layernorm", "post_attention_layernorm", "self_attn", "mlp"), **_heads("self_attn")}
_LLAMA = {**_SPARSE, **_GATED}
_PERSIMMON = {
    **_rows("input_layernorm", "post_attention_layernorm", "self_attn", "mlp"),
    **{f"attn.hook_{x}": Place("self_attn.query_key_value", view=f"by_head {i} 4") for i, x in enumerate("qkv")},
    "attn.hook_z": Place("self_attn.dense", "input", "heads 4"),
    **neurons("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}
_LLAMA4 = {
    **_rows("input_layernorm", "post_attention_layernorm", "self_attn", "feed_forward"),
    **_heads("self_attn"),
}
_LLAMA4_DENSE = {
    **_LLAMA4,
    **neurons("feed_forward.gate_proj", "feed_forward.down_proj", "feed_forward.up_proj"),
}
# Four norms; heads of another size and number where attention is full, and no values of their own.
_SANDWICH = _rows(
    "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
)
_GEMMA4_SLIDING = {**_SANDWICH, **_heads("self_attn")}
_GEMMA4_FULL = {**_SANDWICH, **_heads("self_attn", kv=1, letters="qk")}
# Keys and values are those of an earlier block.
_GEMMA4_SHARED = {**_SANDWICH, **_heads("self_attn", letters="q")}
_GEMMA4 = [*[_GEMMA4_SLIDING, _GEMMA4_FULL] * 2, *[_GEMMA4_SHARED] * 2]
_EXTRA = {"hook_extra_out": Place("post_per_layer_input_norm")}
_MUSE = {**_SANDWICH, **_heads("self_attn")}
# The stream is mixed with what is added by gates of its own.
_MUSE_GATED = {
    "hook_resid_pre": Place("", "input"),
    "ln1.hook_out": Place("input_layernorm"),
    "hook_resid_mid": Place("pre_feedforward_layernorm", "input", in_place=True),
    "ln2.hook_out": Place("pre_feedforward_layernorm"),
    "hook_resid_post": Place(""),
    **_heads("self_attn"),
}
# A convolution over positions stands behind attention and MLP.
_INKLING = {
    **_rows("input_layernorm", "post_attention_layernorm", "attn_sconv", "mlp_sconv"),
    **_heads("self_attn"),
}
_INKLING_SLIDING = {**_INKLING, **_heads("self_attn", kv=4)}

_SIGLIP = {**_rows("layer_norm1", "layer_norm2", "self_attn", "mlp"), **_FC}
_JANUS = {**_SIGLIP, **_heads("self_attn", "projection_layer", kv=4)}
_MOLMO = {**_SIGLIP, **_heads("self_attn")}
_LLAMA4_TOWER = {**_LLAMA4, **_rows("input_layernorm", "post_attention_layernorm", "self_attn", "mlp"), **_FC}
_LLAMA4_TOWER |= _heads("self_attn", kv=4)
_MUSE_TOWER = {**_rows("norm1", "norm2", "attn", "mlp"), **_heads("attn", "proj", kv=4), **_FC}
_GEMMA4_TOWER = {**_SANDWICH, **_heads("self_attn"), **_GATED}

# Molmo's blocks are OLMo's: every projection that can be fused is, the up projection before the gate.
_OLMO = {
    **_rows("attn_norm", "ff_norm", "attn_out", "ff_out"),
    **{f"attn.hook_{x}": Place("att_proj", view=f"grouped {i} 4 2") for i, x in enumerate("qkv")},
    "attn.hook_z": Place("attn_out", "input", "heads 4"),
    "mlp.hook_pre": Place("ff_proj", view="half 1"),
    "mlp.hook_pre_linear": Place("ff_proj", view="half 0"),
    "mlp.hook_post": Place("ff_out", "input"),
}
_CLIP = {
    **_rows("attention_norm", "ffn_norm", "attention", "feed_forward"),
    **{f"attn.hook_{letter}": Place(f"attention.w{letter}", view="heads 4") for letter in "qkv"},
    "attn.hook_z": Place("attention.wo", "input", "heads 4"),
    **neurons("feed_forward.w1", "feed_forward.w2"),
}

_LANGUAGE = "model.language_model.layers"
TEXT: dict[str, Blocks] = {
    "chameleon": _of("model.layers", *[_LLAMA] * 4),
    "emu3": _of("model.text_model.layers", *[_LLAMA] * 4),
    "fuyu": _of(_LANGUAGE, *[_PERSIMMON] * 4),
    "gemma4_unified": _of(_LANGUAGE, *({**rows, **_GATED} for rows in _GEMMA4)),
    "inkling_mm_model": _of(
        _LANGUAGE, {**_INKLING_SLIDING, **_GATED}, {**_INKLING, **_GATED}, _INKLING_SLIDING, _INKLING
    ),
    "gemma4": _of(_LANGUAGE, *({**rows, **_EXTRA} for rows in _GEMMA4)),
    "diffusion_gemma": _of("model.decoder.layers", *_GEMMA4[:4]),
    "muse_glimmer": _of(_LANGUAGE, *[{**_MUSE, **_GATED}] * 4),
    "muse_spark": _of(_LANGUAGE, *[{**_MUSE_GATED, **_GATED}] * 2, *[_MUSE_GATED] * 2),
    "molmo2": _of(_LANGUAGE, *[_LLAMA] * 4),
    "molmo": _of("model.transformer.blocks", *[_OLMO] * 4),
    "llama4": _of("language_model.model.layers", *[_LLAMA4_DENSE] * 2, *[_LLAMA4] * 2),
    "janus": _of(_LANGUAGE, *[_LLAMA] * 4),
}
"""Architecture -> the decoder's blocks."""
FAMILIES = tuple(TEXT)
ENCODER: dict[str, Blocks] = {"diffusion_gemma": _of("model.encoder.language_model.layers", *_GEMMA4[:4])}
TOWER: dict[str, Blocks] = {
    "gemma4": _of("model.vision_tower.encoder.layers", *[_GEMMA4_TOWER] * 3),
    "diffusion_gemma": _of("model.encoder.vision_tower.encoder.layers", *[_GEMMA4_TOWER] * 3),
    **{family: _of("model.vision_tower.layers", *[_MUSE_TOWER] * 4) for family in ("muse_glimmer", "muse_spark")},
    "molmo2": _of("model.vision_tower.layers", *[_MOLMO] * 3),
    "molmo": _of("model.vision_backbone.image_vit.transformer.resblocks", *[_CLIP] * 4),
    "llama4": _of("vision_model.model.layers", *[_LLAMA4_TOWER] * 3),
    "janus": _of("model.vision_model.encoder.layers", *[_JANUS] * 3),
}


def _between(path: str, side: str = "output", last: str = "") -> Rows:
    return {"projector.hook_in": Place(path, "input"), "projector.hook_out": Place(last or path, side)}


_STEPS = _between("model.vision_adapter", last="model.perception_emb_norm")
PROJECTOR: dict[str, Rows] = {
    "fuyu": _between("model.vision_embed_tokens"),
    "gemma4_unified": _between("model.embed_vision", "pooler_output"),
    "inkling_mm_model": _between("model.vision_tower", "pooler_output"),
    "gemma4": _between("model.embed_vision"),
    "diffusion_gemma": _between("model.encoder.embed_vision"),
    "muse_glimmer": _STEPS,
    "muse_spark": _STEPS,
    "molmo2": _between("model.multi_modal_projector", "last_hidden_state"),
    "molmo": _between("model.vision_backbone.image_projector"),
    "llama4": _between("multi_modal_projector"),
    "janus": _between("model.aligner"),
}
NORM = {
    **dict.fromkeys(FAMILIES, "model.language_model.norm"),
    "chameleon": "model.norm",
    "emu3": "model.text_model.norm",
    "fuyu": "model.language_model.final_layernorm",
    "diffusion_gemma": "model.decoder.norm",
    "molmo": "model.transformer.ln_f",
    "llama4": "language_model.model.norm",
}


def _stack(prefix: str, blocks: Blocks) -> Rows:
    found = {}
    for layer, (path, rows) in enumerate(blocks):
        for name, row in rows.items():
            inside = f"{path}.{row.path}" if row.path else path
            found[f"{prefix}blocks.{layer}.{name}"] = Place(inside, row.side, row.view, row.in_place)
    return found | {f"{prefix}hook_embed": found[f"{prefix}blocks.0.hook_resid_pre"]} if found else {}


def places(family: str) -> Rows:
    """Hook name -> place, for every point that is a tensor at a module."""
    return {
        **_stack("vision.", TOWER.get(family, [])),
        **PROJECTOR.get(family, {}),
        **_stack("encoder.", ENCODER.get(family, [])),
        **_stack("", TEXT[family]),
        "ln_final.hook_out": Place(NORM[family]),
        "hook_logits": Place("", "logits"),
    }
