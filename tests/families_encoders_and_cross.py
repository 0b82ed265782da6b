"""Where the hook points of encoder-decoders, cross-attention, Q-Former and prefix models lie, by hand.

From transformers' modeling files; rows and hooks as in `tests.families`; no path here comes from our own code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tests.families import Place, fused, neurons, stream

Rows = dict[str, Place]
Blocks = list[tuple[str, Rows]]


def _summed(mid: str, first: str, second: str) -> Rows:
    """Norms stand behind the sums: the stream in the middle is what comes out of the last one before the MLP."""
    return {
        "hook_resid_pre": Place("", "input"),
        "ln1.hook_out": Place(first),
        "hook_resid_mid": Place(mid),
        "ln2.hook_out": Place(second),
        "hook_resid_post": Place(""),
    }


def _added(attn: str, mlp: str) -> Rows:
    return {"hook_attn_out": Place(attn), "hook_mlp_out": Place(mlp)}


def _heads(paths: str, z: str, name: str = "attn", kv: int = 4) -> Rows:
    found = {f"{name}.hook_z": Place(z, "input", "heads 4")}
    for letter, path in zip("qkv", paths.split(), strict=False):
        found[f"{name}.hook_{letter}"] = Place(path, view=f"heads {4 if letter == 'q' else kv}")
    return found


def _proj(path: str, out: str, name: str = "attn", kv: int = 4) -> Rows:
    return _heads(" ".join(f"{path}.{letter}_proj" for letter in "qkv"), f"{path}.{out}", name, kv)


def _words(path: str, out: str, name: str = "attn") -> Rows:
    return _heads(" ".join(f"{path}.{word}" for word in ("query", "key", "value")), out, name)


_LLAMA_MLP = neurons("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
_FC = neurons("fc1", "fc2")
_VIT = {
    **stream("layer_norm1", "layer_norm2"),
    **_added("self_attn", "mlp"),
    **neurons("mlp.fc1", "mlp.fc2"),
}
_CLIP = {**_VIT, **_proj("self_attn", "out_proj")}
_BLIP = {**_VIT, **fused("self_attn", "projection")}
_HF_VIT = {
    **stream("layernorm_before", "layernorm_after"),
    **_added("attention", "mlp"),
    **_proj("attention", "o_proj"),
    **neurons("mlp.fc1", "mlp.fc2"),
}
_PATCHES = {
    **stream("pre_attention_layer_norm", "pre_mlp_layer_norm"),
    **_added("attention", "mlp"),
    **_words("attention", "attention.output"),
    **neurons("mlp.wi_0", "mlp.wo", "mlp.wi_1"),
}


def _on_grid(rows: Rows) -> Rows:
    return {name: replace(row, view="grid") for name, row in rows.items()}


# The stream is a grid (n, rows, cols, d); what goes into attention and out of it may lie in windows.
_SAM = _on_grid(
    {**stream("layer_norm1", "layer_norm2"), "hook_mlp_out": Place("mlp"), **neurons("mlp.lin1", "mlp.lin2")}
)
_BERT = {
    **_summed("attention.output.LayerNorm", "attention.output.LayerNorm", "output.LayerNorm"),
    **_added("attention.output.dense", "output.dense"),
    **_words("attention.self", "attention.output.dense"),
    **neurons("intermediate.dense", "output.dense"),
}
_BERT_CROSS = {
    **_BERT,
    **_words("crossattention.self", "crossattention.output.dense", "xattn"),
    "hook_xattn_out": Place("crossattention.output.dense"),
    "lnx.hook_out": Place("crossattention.output.LayerNorm"),
    "hook_resid_mid": Place("crossattention.output.LayerNorm"),
}
_IDEFICS = {
    **stream("input_layernorm", "post_attention_layernorm"),
    **_added("self_attn", "mlp"),
    **_proj("self_attn", "o_proj"),
    **_LLAMA_MLP,
}
_IDEFICS_CROSS = {
    **stream("input_layernorm", "post_attention_layernorm"),
    **_proj("cross_attn", "o_proj", "xattn"),
    **_LLAMA_MLP,
    "hook_mlp_out": Place("mlp", factor="tanh alpha_dense"),
}
# OPT's MLP sees all positions of all samples in one row.
_OPT = {
    **stream("self_attn_layer_norm", "final_layer_norm"),
    **_added("self_attn", "fc2"),
    **_proj("self_attn", "out_proj"),
    **_FC,
}
_OPT |= {
    name: replace(_OPT[name], view="rows")
    for name in ("hook_resid_mid", "ln2.hook_out", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out")
}
_KOSMOS = {
    **stream("self_attn_layer_norm", "final_layer_norm"),
    **_added("self_attn", "ffn"),
    **neurons("ffn.fc1", "ffn.fc2"),
}
# What the heads give is normalised before the output projection.
_KOSMOS2 = {**_KOSMOS, **_heads("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.inner_attn_ln")}
_KOSMOS25 = {**_KOSMOS, **_proj("self_attn", "out_proj")}
_T5 = {
    **stream("self_attention.layer_norm", "mlp.layer_norm"),
    **_added("self_attention.attention", "mlp.DenseReluDense"),
    **_words("self_attention.attention", "self_attention.attention.output"),
    **_words("encoder_decoder_attention.attention", "encoder_decoder_attention.attention.output", "xattn"),
    **neurons("mlp.DenseReluDense.wi_0", "mlp.DenseReluDense.wo", "mlp.DenseReluDense.wi_1"),
    "hook_xattn_out": Place("encoder_decoder_attention.attention"),
    "lnx.hook_out": Place("encoder_decoder_attention.layer_norm"),
}
_MBART = {
    **stream("self_attn_layer_norm", "final_layer_norm"),
    **_added("self_attn", "fc2"),
    **_proj("self_attn", "out_proj"),
    **_proj("encoder_attn", "out_proj", "xattn"),
    **_FC,
    "hook_xattn_out": Place("encoder_attn"),
    "lnx.hook_out": Place("encoder_attn_layer_norm"),
}
_TROCR = {**_MBART, **_summed("encoder_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")}
_T5GEMMA = {
    **stream("pre_self_attn_layernorm", "pre_feedforward_layernorm"),
    **_added("post_self_attn_layernorm", "post_feedforward_layernorm"),
    **_proj("self_attn", "o_proj", kv=2),
    **_LLAMA_MLP,
}
# Keys and values are projected twice, from the decoder's stream and from the encoder's, by the same modules.
_T5GEMMA_DECODER = {name: row for name, row in _T5GEMMA.items() if name not in ("attn.hook_k", "attn.hook_v")}


def _udop(last: int) -> Rows:
    own, across, dense = "layer.0.SelfAttention", "layer.1.EncDecAttention", f"layer.{last}.DenseReluDense"
    found = {
        **stream("layer.0.layer_norm", f"layer.{last}.layer_norm"),
        **_added(own, dense),
        **_heads(" ".join(f"{own}.{letter}" for letter in "qkv"), f"{own}.o"),
        **neurons(f"{dense}.wi", f"{dense}.wo"),
    }
    if last == 1:
        return found
    return {
        **found,
        **_heads(" ".join(f"{across}.{letter}" for letter in "qkv"), f"{across}.o", "xattn"),
        "hook_xattn_out": Place(across),
        "lnx.hook_out": Place("layer.1.layer_norm"),
    }


@dataclass(frozen=True)
class Model:
    """One architecture: its blocks by stream, and what lies before, between and behind them.

    Attributes:
        stacks: Prefix of hook names -> (path, rows) of each block.
        norm: Path of the final norm.
        projector: Path of the projector.
        entering: View of what goes into the projector.
    """

    stacks: dict[str, Blocks]
    norm: str = ""
    projector: str = ""
    entering: str = ""
    more: Rows = field(default_factory=dict)

    def places(self) -> Rows:
        """Hook name -> place."""
        found: Rows = {}
        for prefix, blocks in self.stacks.items():
            for layer, (path, rows) in enumerate(blocks):
                for name, row in rows.items():
                    *tanh, factor = row.factor.split() or [""]
                    by = " ".join([*tanh, f"{path}.{factor}"]) if factor else ""
                    inside = f"{path}.{row.path}" if row.path else path
                    found[f"{prefix}blocks.{layer}.{name}"] = replace(row, path=inside, factor=by)
            found[f"{prefix}hook_embed"] = found[f"{prefix}blocks.0.hook_resid_pre"]
        if self.projector:
            found["projector.hook_in"] = Place(self.projector, "input", self.entering)
            found["projector.hook_out"] = Place(self.projector)
        if self.norm:
            found["ln_final.hook_out"] = Place(self.norm)
        return {**found, **self.more, "hook_logits": Place("", "logits")}


def _many(path: str, count: int, rows: Rows) -> Blocks:
    return [(f"{path}.{layer}", rows) for layer in range(count)]


_INSTRUCT = Model(
    {
        "vision.": _many("vision_model.encoder.layers", 3, _BLIP),
        "": _many("language_model.model.decoder.layers", 4, _OPT),
    },
    norm="language_model.model.decoder.final_layer_norm",
    projector="language_projection",
)
_CROSS, _OWN = "model.gated_cross_attn_layers", "model.layers"

MODELS: dict[str, Model] = {
    "blip": Model(
        {
            "vision.": _many("vision_model.encoder.layers", 3, _BLIP),
            "": _many("text_decoder.bert.encoder.layer", 4, _BERT_CROSS),
        }
    ),
    "git": Model(
        {
            "vision.": _many("git.image_encoder.vision_model.encoder.layers", 3, _CLIP),
            "": _many("git.encoder.layer", 4, _BERT),
        },
        projector="git.visual_projection",
    ),
    "idefics": Model(
        {
            "vision.": _many("model.vision_model.encoder.layers", 3, _CLIP),
            "": [
                (f"{_CROSS}.0", _IDEFICS_CROSS),
                *_many(_OWN, 2, _IDEFICS),
                (f"{_CROSS}.1", _IDEFICS_CROSS),
                *_many(_OWN, 4, _IDEFICS)[2:],
            ],
        },
        norm="model.norm",
        projector="model.perceiver_resampler",
    ),
    "instructblip": _INSTRUCT,
    "instructblipvideo": _INSTRUCT,
    "kosmos-2": Model(
        {
            "vision.": _many("vision_model.model.encoder.layers", 3, _CLIP),
            "": _many("text_model.model.layers", 4, _KOSMOS2),
        },
        norm="text_model.model.layer_norm",
        projector="image_to_text_projection",
    ),
    "kosmos-2.5": Model(
        {
            "vision.": _many("vision_model.encoder.layer", 3, _PATCHES),
            "": _many("text_model.model.layers", 4, _KOSMOS25),
        },
        norm="text_model.model.layer_norm",
        projector="image_to_text_projection",
    ),
    "pix2struct": Model(
        {"vision.": _many("encoder.encoder.layer", 3, _PATCHES), "": _many("decoder.layer", 4, _T5)},
        norm="decoder.final_layer_norm",
    ),
    "pp_formulanet": Model(
        {"vision.": _many("model.encoder.layers", 4, _SAM), "": _many("model.decoder.layers", 3, _MBART)},
        norm="model.decoder.layer_norm",
        projector="model.encoder.multi_modal_projector",
        entering="map",
    ),
    "t5gemma2": Model(
        {
            "vision.": _many("model.encoder.vision_tower.encoder.layers", 3, _CLIP),
            "encoder.": _many("model.encoder.text_model.layers", 4, _T5GEMMA),
            "": _many("model.decoder.layers", 4, _T5GEMMA_DECODER),
        },
        norm="model.decoder.norm",
        projector="model.encoder.multi_modal_projector",
    ),
    "udop": Model(
        {"encoder.": _many("encoder.block", 3, _udop(1)), "": _many("decoder.block", 3, _udop(2))},
        norm="decoder.final_layer_norm",
    ),
    "vision-encoder-decoder": Model(
        {"vision.": _many("encoder.layers", 3, _HF_VIT), "": _many("decoder.model.decoder.layers", 4, _TROCR)},
        projector="enc_to_dec_proj",
    ),
}
