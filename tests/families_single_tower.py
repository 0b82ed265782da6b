"""Where the hook points of the architectures with one tower lie, by hand from transformers' modeling files.

Rows and hooks as in `tests.families`; no path here comes from our own code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.families import Place, fused, neurons

Rows = dict[str, Place]


def _added(attn: str, mlp: str, by: str = "") -> Rows:
    return {"hook_attn_out": Place(attn, factor=by), "hook_mlp_out": Place(mlp, factor=by)}


def _stream(mid: str = "", first: str = "") -> Rows:
    found = {"hook_resid_pre": Place("", "input"), "hook_resid_post": Place("")}
    found |= {"hook_resid_mid": Place(mid, "input", in_place=True), "ln2.hook_out": Place(mid)} if mid else {}
    return found | ({"ln1.hook_out": Place(first)} if first else {})


def _heads(path: str, out: str, q: int = 4, kv: int = 4) -> Rows:
    found = {
        f"attn.hook_{letter}": Place(f"{path}.{letter}_proj", view=f"heads {kv if letter in 'kv' else q}")
        for letter in "qkv"
    }
    return {**found, "attn.hook_z": Place(f"{path}.{out}", "input", f"heads {q}")}


_GATED = neurons("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
_W123 = neurons("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_LLAMA = {
    **_stream("post_attention_layernorm", "input_layernorm"),
    **_added("self_attn", "mlp"),
    **_heads("self_attn", "o_proj", 4, 2),
    **_GATED,
}
_GRANITE = {**_LLAMA, **_added("self_attn", "mlp", "residual_multiplier")}
# Attention and MLP read the same norm and are added together: there is nothing between them.
_COHERE = {
    **_stream(first="input_layernorm"),
    **_added("self_attn", "mlp"),
    **_heads("self_attn", "o_proj", 4, 2),
    **_GATED,
}
_GEMMA3 = {
    **_LLAMA,
    **_stream("pre_feedforward_layernorm", "input_layernorm"),
    **_added("post_attention_layernorm", "post_feedforward_layernorm"),
}
_LFM = {**_stream("ffn_norm", "operator_norm"), **_W123}
_LFM2 = {**_LFM, **_added("self_attn", "feed_forward"), **_heads("self_attn", "out_proj", 4, 2)}
_LFM2_CONV = {**_LFM, "hook_mixer_out": Place("conv"), "hook_mlp_out": Place("feed_forward")}
_LFM3 = {**_LFM, **_added("post_operator_norm", "post_ffn_norm"), **_heads("self_attn", "o_proj", 4, 2)}
_LFM3_CONV = {**_LFM, "hook_mixer_out": Place("post_operator_norm"), "hook_mlp_out": Place("post_ffn_norm")}
# Keys and values are made from a latent, queries as ever.
_LATENT = {
    **_stream("post_attention_layernorm", "input_layernorm"),
    **_added("self_attn", "mlp"),
    "attn.hook_q": Place("self_attn.q_proj", view="heads 4"),
    "attn.hook_z": Place("self_attn.o_proj", "input", "heads 4"),
}
_VIT = {
    **_stream("layer_norm2", "layer_norm1"),
    **_added("self_attn", "mlp"),
    **_heads("self_attn", "out_proj"),
    **neurons("mlp.fc1", "mlp.fc2"),
}
_PIXTRAL = {
    **_stream("ffn_norm", "attention_norm"),
    **_added("attention", "feed_forward"),
    **_heads("attention", "o_proj"),
    **neurons("feed_forward.gate_proj", "feed_forward.down_proj", "feed_forward.up_proj"),
}
_QWEN = {
    **_stream("norm2", "norm1"),
    **_added("attn", "mlp"),
    **fused("attn", "proj"),
    **neurons("mlp.linear_fc1", "mlp.linear_fc2"),
}
# timm's EVA, which Perception LM's tower is.
_EVA = {
    **_stream("norm2", "norm1"),
    "hook_attn_out": Place("attn", factor="gamma_1"),
    "hook_mlp_out": Place("mlp", factor="gamma_2"),
    **fused("attn", "proj"),
    **neurons("mlp.fc1", "mlp.fc2"),
}


def _on_grid(rows: Rows) -> Rows:
    return {name: replace(row, view="grid") if not row.view else row for name, row in rows.items()}


# The stream is a grid (n, rows, cols, d); what goes into attention and out of it lies in windows.
_SAM = _on_grid(
    {**_stream("layer_norm2", "layer_norm1"), "hook_mlp_out": Place("mlp"), **neurons("mlp.lin1", "mlp.lin2")}
)


@dataclass(frozen=True)
class Model:
    """One architecture: its blocks, and what lies before, between and behind them.

    Attributes:
        text, tower: (path of the list, rows of each block).
        projector: Path (none where it runs once per image), view of what goes in, view of what comes out.
        norm: Path of the final norm.
    """

    text: tuple[str, list[Rows]]
    tower: tuple[str, list[Rows]]
    projector: str = "model.multi_modal_projector"
    entering: str = ""
    leaving: str = ""
    norm: str = "model.language_model.norm"

    def representatives(self) -> dict[str, Place]:
        """Those in the first block of each plan, and those outside blocks."""
        starts = []
        for prefix, (_, blocks) in (("vision.", self.tower), ("", self.text)):
            firsts = [layer for layer, rows in enumerate(blocks) if rows not in blocks[:layer]]
            starts += [f"{prefix}blocks.{layer}." for layer in firsts]
        return {
            name: place
            for name, place in self.places().items()
            if "blocks." not in name or name.startswith(tuple(starts))
        }

    def places(self) -> dict[str, Place]:
        """Hook name -> place."""
        found: dict[str, Place] = {}
        for prefix, (path, blocks) in (("vision.", self.tower), ("", self.text)):
            for layer, rows in enumerate(blocks):
                for name, row in rows.items():
                    inside = f"{path}.{layer}"
                    factor = row.factor and f"{inside}.{row.factor}"
                    whole = f"{inside}.{row.path}" if row.path else inside
                    found[f"{prefix}blocks.{layer}.{name}"] = replace(row, path=whole, factor=factor)
            if blocks:
                found[f"{prefix}hook_embed"] = found[f"{prefix}blocks.0.hook_resid_pre"]
        between = {
            "projector.hook_in": Place(self.projector, "input", self.entering),
            "projector.hook_out": Place(self.projector, view=self.leaving),
        }
        return {
            **found,
            **(between if self.projector else {}),
            "ln_final.hook_out": Place(self.norm),
            "hook_logits": Place("", "logits"),
        }


_CLIP = ("model.vision_tower.encoder.layers", [_VIT] * 3)
_PATCHES = ("model.vision_tower.transformer.layers", [_PIXTRAL] * 4)
_LAYERS = "model.language_model.layers"
_TEXT = (_LAYERS, [_LLAMA] * 4)
_PARALLEL = Model((_LAYERS, [_COHERE] * 4), _CLIP, leaving="grid")
_GOT = Model(_TEXT, ("model.vision_tower.layers", [_SAM] * 4), entering="map")

MODELS: dict[str, Model] = {
    "aya_vision": _PARALLEL,
    "cohere2_vision": _PARALLEL,
    "cohere_compass": Model(
        (_LAYERS, [_COHERE] * 4), ("model.visual.blocks", [_QWEN] * 3), projector="model.visual.merger"
    ),
    # Stages of convolutions, without blocks that have a stream.
    "fast_vlm": Model(_TEXT, ("", [])),
    "perception_lm": Model(_TEXT, ("model.vision_tower.timm_model.blocks", [_EVA] * 3)),
    "got_ocr2": _GOT,
    "pp_chart2table": _GOT,
    "llava_next_video": Model(_TEXT, _CLIP),
    "vipllava": Model(_TEXT, _CLIP),
    "video_llava": Model(_TEXT, ("model.image_tower.encoder.layers", [_VIT] * 3)),
    "mistral3": Model(_TEXT, _PATCHES),
    "mistral_large4": Model((_LAYERS, [{**_LATENT, **_GATED}] * 2 + [_LATENT] * 4), _PATCHES),
    "lighton_ocr": Model(
        _TEXT, ("model.vision_encoder.transformer.layers", [_PIXTRAL] * 4), projector="model.vision_projection"
    ),
    "paligemma": Model(_TEXT, _CLIP),
    "shieldgemma2": Model((_LAYERS, [_GEMMA3] * 4), _CLIP),
    # The features that enter the first block are those of the second of the layers' projectors.
    "granite4_vision": Model((_LAYERS, [_GRANITE] * 7), _CLIP, projector="model.layerwise_projectors.1"),
    "granite_docling": Model(
        ("model.text_model.layers", [_GRANITE] * 4),
        ("model.vision_model.encoder.layers", [_VIT] * 3),
        projector="model.vision_model.connector",
        norm="model.text_model.norm",
    ),
    "lfm2_vl": Model(
        (_LAYERS, [_LFM2_CONV, _LFM2, _LFM2_CONV, _LFM2, _LFM2_CONV]),
        _CLIP,
        projector="",
        norm="model.language_model.embedding_norm",
    ),
    "lfm3_vl": Model(
        (_LAYERS, [_LFM3_CONV, _LFM3, _LFM3] * 2),
        ("model.vision_tower.layers", [_LFM2_CONV, _LFM2, _LFM2_CONV, _LFM2, _LFM2_CONV]),
        norm="model.language_model.embedding_norm",
    ),
}
