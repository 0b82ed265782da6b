"""Where things are in a transformers model: its decoder layers, tower, projector, norms and embeddings.

Found by transformers' own conventions first (`get_decoder`, `get_encoder`, `get_output_embeddings`), then by the
attribute names in the tables below. A family is admitted once its hook points are proved by tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

from hooked_mm.errors import UnsupportedModelError

FAMILIES = ("llava",)
"""`config.model_type` of the families whose hook points are proved."""

# role in the block -> attribute paths it goes by, the first that exists is taken; "" is the block itself.
PART_NAMES: dict[str, tuple[str, ...]] = {
    "block": ("",),
    "ln1": ("input_layernorm", "layer_norm1", "ln_1"),
    "attn": ("self_attn", "attn"),
    "q": ("self_attn.q_proj", "attn.q_proj"),
    "k": ("self_attn.k_proj", "attn.k_proj"),
    "v": ("self_attn.v_proj", "attn.v_proj"),
    "o": ("self_attn.o_proj", "self_attn.out_proj", "attn.o_proj"),
    "ln2": ("post_attention_layernorm", "layer_norm2", "ln_2"),
    "mlp": ("mlp",),
    "mlp_gate": ("mlp.gate_proj", "mlp.fc1"),
    "mlp_up": ("mlp.up_proj",),
    "mlp_down": ("mlp.down_proj", "mlp.fc2"),
}
PROJECTOR_NAMES = ("multi_modal_projector",)
FINAL_NORM_NAMES = ("norm", "final_layernorm", "ln_f")
LAYER_LIST_NAMES = ("layers", "encoder.layers", "blocks")


@dataclass(frozen=True)
class StackConfig:
    """Sizes of a stack of like blocks."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int


@dataclass(frozen=True)
class Stack(StackConfig):
    """A stack of blocks with its place. `parts`: role -> path inside a block (see PART_NAMES)."""

    layers: str
    parts: MappingProxyType[str, str] = field(repr=False)


@dataclass(frozen=True)
class Structure:
    """Module paths of one model, the token that marks image positions, and how positions are counted.

    `plain_positions`: position ids are one number per token (not the three of Qwen-VL's rotary embedding), so that they
    can be counted from the attention mask.
    """

    family: str
    text: Stack
    vision: Stack | None
    projector: str | None
    final_norm: str
    embed: str
    unembed: str
    image_token_id: int | None
    plain_positions: bool


def _get(module: nn.Module, path: str) -> Any:
    for name in path.split(".") if path else ():
        if not hasattr(module, name):
            return None
        module = getattr(module, name)
    return module


def _first(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if _get(module, name) is not None), None)


def _stack(paths: dict[int, str], owner: nn.Module, config: Any, what: str) -> Stack:
    name = _first(owner, LAYER_LIST_NAMES)
    if name is None:
        raise UnsupportedModelError(
            f"no layers found in the {what} {type(owner).__name__}: none of the attributes "
            f"{', '.join(LAYER_LIST_NAMES)} exists. Add the name to hooked_mm/structure.py."
        )
    layers = _get(owner, name)
    found = {role: _first(layers[0], names) for role, names in PART_NAMES.items()}
    missing = [role for role in ("ln1", "attn", "ln2", "mlp") if found[role] is None]
    if missing:
        raise UnsupportedModelError(
            f"a block of the {what} ({type(layers[0]).__name__}) has no recognised {', '.join(missing)}; it has "
            f"{', '.join(child for child, _ in layers[0].named_children())}. Add the name to PART_NAMES in "
            "hooked_mm/structure.py."
        )
    heads = config.num_attention_heads
    return Stack(
        layers=paths[id(layers)],
        n_layers=len(layers),
        d_model=config.hidden_size,
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        d_mlp=config.intermediate_size,
        parts=MappingProxyType({role: path for role, path in found.items() if path is not None}),
    )


def resolve(model: Any) -> Structure:
    """Find the parts of a loaded transformers model (PEFT-wrapped too).

    Raises:
        UnsupportedModelError: for a family that is not admitted yet, or a block with unknown parts.
    """
    # PEFT keeps the transformers model inside; its modules are found by identity, so the paths stay those of `model`.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(inner, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {family!r} is not supported; supported: {', '.join(FAMILIES)}. Other architectures can be "
            "traced with nnsight directly."
        )
    paths = {id(module): path for path, module in model.named_modules()}
    decoder = inner.get_decoder()
    tower = inner.get_encoder(modality="image")
    core = inner.model
    projector = _first(core, PROJECTOR_NAMES)
    norm = _first(decoder, FINAL_NORM_NAMES)
    if projector is None or norm is None:
        raise UnsupportedModelError(
            f"no {'projector' if projector is None else 'final norm'} found in {type(inner).__name__}; known names are "
            f"{', '.join(PROJECTOR_NAMES + FINAL_NORM_NAMES)}. Add the name to hooked_mm/structure.py."
        )
    return Structure(
        family=family,
        text=_stack(paths, decoder, config.get_text_config(), "decoder"),
        vision=_stack(paths, tower, config.vision_config, "vision tower"),
        projector=paths[id(getattr(core, projector))],
        final_norm=paths[id(getattr(decoder, norm))],
        embed=paths[id(inner.get_input_embeddings())],
        unembed=paths[id(inner.get_output_embeddings())],
        image_token_id=getattr(config, "image_token_id", None),
        plain_positions="mrope_section" not in (getattr(config.get_text_config(), "rope_parameters", None) or {}),
    )
