"""Reading and writing with plain PyTorch hooks, written without our own code, to check ours against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.versions import IN_CLIP

# name -> (module path with {l}, side, number of heads or None), by hand from transformers' LLaVA, Llama and CLIP.
TEXT = "model.language_model.layers.{l}"
VISION = f"model.vision_tower.{IN_CLIP}encoder.layers.{{l}}"
TABLE: dict[str, tuple[str, str, int | None]] = {
    "vision.hook_embed": (VISION.format(l=0), "input", None),
    "projector.hook_in": ("model.multi_modal_projector", "input", None),
    "projector.hook_out": ("model.multi_modal_projector", "output", None),
    "hook_embed": (TEXT.format(l=0), "input", None),
    "ln_final.hook_out": ("model.language_model.norm", "output", None),
    "hook_logits": ("lm_head", "output", None),
}
for _l in range(6):
    _path, _name = TEXT.format(l=_l), f"blocks.{_l}."
    TABLE |= {
        _name + "hook_resid_pre": (_path, "input", None),
        _name + "ln1.hook_out": (_path + ".input_layernorm", "output", None),
        _name + "attn.hook_q": (_path + ".self_attn.q_proj", "output", 4),
        _name + "attn.hook_k": (_path + ".self_attn.k_proj", "output", 4),
        _name + "attn.hook_v": (_path + ".self_attn.v_proj", "output", 4),
        _name + "attn.hook_z": (_path + ".self_attn.o_proj", "input", 4),
        _name + "hook_attn_out": (_path + ".self_attn", "output", None),
        _name + "hook_resid_mid": (_path + ".post_attention_layernorm", "input", None),
        _name + "ln2.hook_out": (_path + ".post_attention_layernorm", "output", None),
        _name + "mlp.hook_pre": (_path + ".mlp.gate_proj", "output", None),
        _name + "mlp.hook_pre_linear": (_path + ".mlp.up_proj", "output", None),
        _name + "mlp.hook_post": (_path + ".mlp.down_proj", "input", None),
        _name + "hook_mlp_out": (_path + ".mlp", "output", None),
        _name + "hook_resid_post": (_path, "output", None),
    }
for _l in range(4):
    _path, _name = VISION.format(l=_l), f"vision.blocks.{_l}."
    TABLE |= {
        _name + "hook_resid_pre": (_path, "input", None),
        _name + "ln1.hook_out": (_path + ".layer_norm1", "output", None),
        _name + "attn.hook_q": (_path + ".self_attn.q_proj", "output", 4),
        _name + "attn.hook_k": (_path + ".self_attn.k_proj", "output", 4),
        _name + "attn.hook_v": (_path + ".self_attn.v_proj", "output", 4),
        _name + "attn.hook_z": (_path + ".self_attn.out_proj", "input", 4),
        _name + "hook_attn_out": (_path + ".self_attn", "output", None),
        _name + "hook_resid_mid": (_path + ".layer_norm2", "input", None),
        _name + "ln2.hook_out": (_path + ".layer_norm2", "output", None),
        _name + "mlp.hook_pre": (_path + ".mlp.fc1", "output", None),
        _name + "mlp.hook_post": (_path + ".mlp.fc2", "input", None),
        _name + "hook_mlp_out": (_path + ".mlp", "output", None),
        _name + "hook_resid_post": (_path, "output", None),
    }


def _tensor(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def raw_hook(model: nn.Module, name: str, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """A PyTorch hook at the place that `TABLE` gives for the name; what `function` returns replaces the value."""
    path, side, _ = TABLE[name]
    module = model.get_submodule(path)

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        key = next(iter(kwargs))
        new = function(kwargs[key])
        return None if new is None else (args, {**kwargs, key: new})

    def after(_: nn.Module, args: tuple, output: Any) -> Any:
        new = function(_tensor(output))
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        # First in line: transformers records hidden states by hooks of its own, and LLaVA's projector reads the record.
        handle = module.register_forward_hook(after, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def raw_values(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the value at every place of `TABLE`, each read in a pass of its own."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        logits = model(**inputs).logits
        for name, (_, _, heads) in TABLE.items():

            def keep(value: Tensor, name: str = name, heads: int | None = heads) -> None:
                found[name] = value.clone() if heads is None else value.clone().reshape(*value.shape[:-1], heads, -1)

            with raw_hook(model, name, keep):
                model(**inputs)
    return logits, found
