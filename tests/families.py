"""Where every family's hook points lie, by hand from transformers' modeling files, and plain PyTorch hooks there.

Written without our own code, to check ours against: no path here comes from `hooked_mm.structure`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_mm.architectures import FAMILIES
from tests.shown import show, unshow
from tests.versions import IN_CLIP, RECORDED_INSIDE

Function = Callable[[Tensor], Tensor | None]
# Families whose blocks are, class for class, those of another one.
ALIKE = ("llava_next", "llava_onevision", "smolvlm", "qwen2_vl")
DISTINCT = [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in FAMILIES]


@dataclass(frozen=True)
class Place:
    """A tensor at a module: `view` is how its name promises it, `in_place` that only a write into it reaches all.

    `factor`: a parameter of the block that multiplies it ("tanh " in front: its tanh) before it counts.
    """

    path: str
    side: str = "output"
    view: str = ""
    in_place: bool = False
    factor: str = ""


def _attention(path: str, o: str, q: int = 4, kv: int = 4, name: str = "attn") -> dict[str, Place]:
    return {
        f"{name}.hook_q": Place(f"{path}.q_proj", view=f"heads {q}"),
        f"{name}.hook_k": Place(f"{path}.k_proj", view=f"heads {kv}"),
        f"{name}.hook_v": Place(f"{path}.v_proj", view=f"heads {kv}"),
        f"{name}.hook_z": Place(f"{path}.{o}", "input", f"heads {q}"),
    }


def fused(path: str, o: str, heads: int = 4) -> dict[str, Place]:
    """Queries, keys and values of one projection, one behind the other."""
    parts = {f"attn.hook_{part}": Place(f"{path}.qkv", view=f"fused {i} {heads}") for i, part in enumerate("qkv")}
    return {**parts, "attn.hook_z": Place(f"{path}.{o}", "input", f"heads {heads}")}


def _norms(first: str, second: str, view: str = "") -> dict[str, Place]:
    return {
        "ln1.hook_out": Place(first),
        "ln2.hook_out": Place(second, view=view),
        "hook_resid_mid": Place(second, "input", view, in_place=True),
    }


def stream(first: str, second: str) -> dict[str, Place]:
    """Norms stand in front: the stream in the middle is what goes into the second one."""
    return {
        "hook_resid_pre": Place("", "input"),
        "ln1.hook_out": Place(first),
        "hook_resid_mid": Place(second, "input"),
        "ln2.hook_out": Place(second),
        "hook_resid_post": Place(""),
    }


def neurons(pre: str, post: str, up: str = "", view: str = "") -> dict[str, Place]:
    """The points inside an MLP."""
    found = {"mlp.hook_pre": Place(pre, view=view), "mlp.hook_post": Place(post, "input", view)}
    return {**found, **({"mlp.hook_pre_linear": Place(up)} if up else {})}


def _out(attn: str, mlp: str = "mlp", view: str = "") -> dict[str, Place]:
    return {"hook_attn_out": Place(attn), "hook_mlp_out": Place(mlp, view=view)}


_STREAM = {"hook_resid_pre": Place("", "input"), "hook_resid_post": Place("", in_place=RECORDED_INSIDE)}
_GATED = neurons("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
_FC = neurons("mlp.fc1", "mlp.fc2")
_LLAMA = {
    **_STREAM,
    **_norms("input_layernorm", "post_attention_layernorm"),
    **_attention("self_attn", "o_proj", 4, 2),
    **_GATED,
    **_out("self_attn"),
}
_GEMMA = {
    **_LLAMA,
    **_norms("input_layernorm", "pre_feedforward_layernorm"),
    **_out("post_attention_layernorm", "post_feedforward_layernorm"),
}
_OPT = {
    **_STREAM,
    **_norms("self_attn_layer_norm", "final_layer_norm", "rows"),
    **_attention("self_attn", "out_proj"),
    **neurons("fc1", "fc2", view="rows"),
    **_out("self_attn", "fc2", "rows"),
}
_BART = {
    **_STREAM,
    **_attention("self_attn", "out_proj"),
    **_out("self_attn", "fc2"),
    **neurons("fc1", "fc2"),
    "ln1.hook_out": Place("self_attn_layer_norm"),
    "ln2.hook_out": Place("final_layer_norm"),
}
_BART_ENCODER = {**_BART, "hook_resid_mid": Place("self_attn_layer_norm")}
_BART_DECODER = {
    **_BART,
    **_attention("encoder_attn", "out_proj", name="xattn"),
    "hook_xattn_out": Place("encoder_attn"),
    "lnx.hook_out": Place("encoder_attn_layer_norm"),
    "hook_resid_mid": Place("encoder_attn_layer_norm"),
}
_MLLAMA_CROSS = {
    **_STREAM,
    **_norms("input_layernorm", "post_attention_layernorm"),
    **_attention("cross_attn", "o_proj", 4, 2, name="xattn"),
    **_GATED,
    "hook_xattn_out": Place("cross_attn", factor="tanh cross_attn_attn_gate"),
}
_VIT = {
    **_STREAM,
    **_norms("layer_norm1", "layer_norm2"),
    **_attention("self_attn", "out_proj"),
    **_FC,
    **_out("self_attn"),
}
_BLIP = {**_VIT, **fused("self_attn", "projection")}
_QWEN2 = {**_STREAM, **_norms("norm1", "norm2"), **fused("attn", "proj"), **_FC, **_out("attn")}
_INTERN = {
    **_STREAM,
    **_norms("layernorm_before", "layernorm_after"),
    **_attention("attention", "projection_layer"),
    **_FC,
    "hook_attn_out": Place("attention", factor="lambda_1"),
    "hook_mlp_out": Place("mlp", factor="lambda_2"),
}
_MLLAMA_TOWER = {
    **_STREAM,
    **_norms("input_layernorm", "post_attention_layernorm"),
    **_attention("self_attn", "o_proj"),
    **_FC,
    **_out("self_attn"),
}
_MLLAMA_GLOBAL = {
    **_MLLAMA_TOWER,
    "hook_attn_out": Place("self_attn", factor="tanh gate_attn"),
    "hook_mlp_out": Place("mlp", factor="tanh gate_ffn"),
}


def _davit(attn: str, heads: int) -> dict[str, Place]:
    return {
        "hook_resid_pre": Place("", "input", "map"),
        "hook_resid_post": Place("", view="map"),
        "hook_conv1_out": Place("conv1", view="map"),
        "hook_conv2_out": Place("conv2", view="map"),
        "hook_resid_mid": Place("conv2", "input", "map", in_place=True),
        "ln1.hook_out": Place("norm1"),
        "ln2.hook_out": Place("norm2"),
        **fused(attn, "proj", heads),
        **neurons("ffn.fc1", "ffn.fc2"),
        **_out(attn, "ffn"),
    }


Blocks = list[tuple[str, dict[str, Place]]]


def _many(path: str, count: int, rows: dict[str, Place]) -> Blocks:
    return [(f"{path}.{index}", rows) for index in range(count)]


_TEXT = _many("model.language_model.layers", 4, _LLAMA)
_TEXT_MODEL = _many("model.text_model.layers", 4, _LLAMA)
_IDEFICS = _many("model.vision_model.encoder.layers", 3, _VIT)
_CLIP = _many(f"model.vision_tower.{IN_CLIP}encoder.layers", 3, _VIT)
_STAGES = [("0.0", 2), ("1.0", 4), ("1.1", 4)]
_MLLAMA_TEXT = [(f"model.language_model.layers.{i}", _MLLAMA_CROSS if i in (1, 3) else _LLAMA) for i in range(5)]
TEXT: dict[str, Blocks] = {
    **dict.fromkeys(FAMILIES, _TEXT),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _TEXT_MODEL),
    "gemma3": _many("model.language_model.layers", 4, _GEMMA),
    "mllama": _MLLAMA_TEXT,
    "blip-2": _many("language_model.model.decoder.layers", 4, _OPT),
    "florence2": _many("model.language_model.decoder.layers", 3, _BART_DECODER),
}
TOWER: dict[str, Blocks] = {
    **dict.fromkeys(FAMILIES, _CLIP),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _IDEFICS),
    "qwen2_vl": _many("model.visual.blocks", 3, _QWEN2),
    "qwen2_5_vl": _many("model.visual.blocks", 3, {**_QWEN2, **_GATED}),
    "qwen3_vl": _many("model.visual.blocks", 3, {**_QWEN2, **neurons("mlp.linear_fc1", "mlp.linear_fc2")}),
    "internvl": _many("model.vision_tower.encoder.layer", 3, _INTERN),
    "mllama": [
        *_many("model.vision_model.transformer.layers", 3, _MLLAMA_TOWER),
        *_many("model.vision_model.global_transformer.layers", 2, _MLLAMA_GLOBAL),
    ],
    "blip-2": _many("vision_model.encoder.layers", 3, _BLIP),
    "florence2": [
        (f"model.vision_tower.blocks.{stage}.{child}_block", _davit(attn, heads))
        for stage, heads in _STAGES
        for child, attn in (("spatial", "window_attn"), ("channel", "channel_attn"))
    ],
}
PROJECTOR = {
    **dict.fromkeys(FAMILIES, "model.multi_modal_projector"),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), "model.connector"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "model.visual.merger"),
    "blip-2": "language_projection",
}
NORM = {
    **dict.fromkeys(FAMILIES, "model.language_model.norm"),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), "model.text_model.norm"),
    "blip-2": "language_model.model.decoder.final_layer_norm",
}


def _stack(prefix: str, blocks: Blocks) -> dict[str, Place]:
    found = {}
    for layer, (path, rows) in enumerate(blocks):
        for name, row in rows.items():
            inside = f"{path}.{row.path}" if row.path else path
            factor = row.factor and " ".join([*row.factor.split()[:-1], f"{path}.{row.factor.split()[-1]}"])
            found[f"{prefix}blocks.{layer}.{name}"] = Place(inside, row.side, row.view, row.in_place, factor)
    found[f"{prefix}hook_embed"] = found[f"{prefix}blocks.0.hook_resid_pre"]
    return found


def places(family: str) -> dict[str, Place]:
    """Hook name -> place, for every point that is a tensor at a module."""
    projector = PROJECTOR[family]
    tiles = "tiles" if family == "mllama" else ""
    found = {
        **_stack("vision.", TOWER[family]),
        "projector.hook_in": Place(projector, "input", "map" if family == "florence2" else tiles),
        # Qwen2.5's merger works in window order; the tower's result is in the picture's.
        "projector.hook_out": Place("model.visual", "pooler_output")
        if family == "qwen2_5_vl"
        else Place(projector, view=tiles),
        **_stack("", TEXT[family]),
        "hook_logits": Place("", "logits"),
    }
    if family != "florence2":
        return {**found, "ln_final.hook_out": Place(NORM[family])}
    language = "model.language_model"
    return {
        **found,
        **_stack("encoder.", _many(f"{language}.encoder.layers", 3, _BART_ENCODER)),
        "encoder.ln_embed.hook_out": Place(f"{language}.encoder.layernorm_embedding"),
        "ln_embed.hook_out": Place(f"{language}.decoder.layernorm_embedding"),
    }


def factor_of(model: nn.Module, place: Place) -> Tensor | None:
    """What multiplies the value before it counts: a parameter, or a number."""
    if not place.factor:
        return None
    *tanh, path = place.factor.split()
    value = torch.as_tensor(attrgetter(path)(model))
    return value.tanh() if tanh else value


@contextmanager
def raw_hook(model: nn.Module, place: Place, function: Function) -> Iterator[None]:
    """A PyTorch hook; what `function` returns for the value replaces it."""
    module, factor = model.get_submodule(place.path), factor_of(model, place)

    def changed(value: Tensor, batch: int = 0) -> Tensor | None:
        shown = show(value, "" if place.view == "rows" else place.view, batch)
        new = function(shown if factor is None else shown * factor)
        if new is None:
            return None
        back = unshow(new if factor is None else new / factor, value, place.view)
        if place.in_place:
            value.copy_(back)
            return None
        return back

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args:
            new = changed(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        key = next(iter(kwargs))
        new = changed(kwargs[key])
        return None if new is None else (args, {**kwargs, key: new})

    def after(_: nn.Module, args: tuple, output: Any) -> Any:
        if place.side != "output":
            new = changed(getattr(output, place.side))
            if new is not None:
                setattr(output, place.side, new)
            return output
        new = changed(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if place.side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        # First in line: transformers records hidden states by hooks of its own, and towers are read from the record.
        handle = module.register_forward_hook(after, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def raw_hooks(model: nn.Module, pairs: Iterable[tuple[Place, Function]]) -> Iterator[None]:
    """Several at once."""
    with ExitStack() as stack:
        for place, function in pairs:
            stack.enter_context(raw_hook(model, place, function))
        yield


def raw_values(model: nn.Module, inputs: Mapping[str, Tensor], table: Mapping[str, Place]) -> dict[str, Tensor]:
    """The value at every place, read in one pass."""
    found: dict[str, Tensor] = {}
    batch = len(next(iter(inputs.values())))

    def keep(name: str) -> Function:
        def function(value: Tensor) -> None:
            now = show(value, "rows", batch).clone() if table[name].view == "rows" else value.clone()
            # A module that runs again (Ovis looks up the marks of images, too) is meant the first time.
            found.setdefault(name, now)

        return function

    with torch.no_grad(), raw_hooks(model, [(place, keep(name)) for name, place in table.items()]):
        model(**inputs)
    return found


def shift(value: Tensor) -> Tensor:
    """A change that keeps values of a sensible size and mixes the last dimension."""
    return value.flip(-1) * 0.5 + 0.1


def representatives(model: nn.Module, family: str) -> list[str]:
    """Names of `places` in the second block of each class of each stack, and outside blocks."""
    chosen: dict[tuple[str, type], list[str]] = {}
    stacks = {"vision.": TOWER[family], "": TEXT[family]}
    if family == "florence2":
        stacks["encoder."] = _many("model.language_model.encoder.layers", 3, _BART_ENCODER)
    for prefix, blocks in stacks.items():
        for layer, (path, _) in enumerate(blocks):
            chosen.setdefault((prefix, type(model.get_submodule(path))), []).append(f"{prefix}blocks.{layer}.")
    starts = tuple(layers[min(1, len(layers) - 1)] for layers in chosen.values())
    return [name for name in places(family) if "blocks." not in name or name.startswith(starts)]


def close(got: Tensor, expected: Tensor, keep: Tensor | None = None) -> float:
    """Largest difference, relative to the largest value; only where `keep` (over the first dimensions) is true."""
    assert got.shape == expected.shape
    if keep is not None:
        got, expected = got[keep], expected[keep]
    assert bool(got.isfinite().all())
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12))
