"""Where things are in a transformers model: its decoder blocks, tower, projector, norms and embeddings.

Found by transformers' own conventions first (`get_decoder`, `get_encoder`, `get_output_embeddings`,
`_can_record_outputs`), then by the attribute names in the tables of `architectures`; sizes are read off the modules
themselves. `conformance` judges the outcome with a probe forward. What no rule finds is one readable row there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooked_mm.architectures import (
    EMBED_NORM_NAMES,
    EXCEPTIONS,
    FAMILIES,
    FINAL_NORM_NAMES,
    LAYER_LIST_NAMES,
    PART_NAMES,
    POST_NORM_BLOCKS,
    PROJECTOR_NAMES,
    SCALES,
    Oddity,
)
from hooked_mm.errors import UnsupportedModelError


@dataclass(frozen=True)
class StackConfig:
    """Sizes of a stack of blocks; where blocks differ in width, those of the last."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int


@dataclass(frozen=True)
class HookedConfig(StackConfig):
    """Sizes of the language model, and of the tower in `vision`."""

    d_vocab: int
    family: str
    vision: StackConfig | None


@dataclass(frozen=True)
class Block:
    """One block of a stack.

    Attributes:
        path: Of the block in the transformers model.
        parts: Role (see PART_NAMES) -> path inside the block.
        kind: Its class, with what distinguishes blocks of one class; blocks of one kind behave alike.
        norm: `"pre"`: norms stand before attention and MLP; `"post"`: after the sums.
        scales: `"attn"`, `"xattn"`, `"mlp"` -> (parameter, function) that multiplies what is added.
        rotary: Queries and keys change between projection and scores (rotary embedding, query-key norm).
        row_mask: Some rows of the MLP's output are dropped before the sum (mllama's text without an image).
        map: The stream between blocks is a map (n, d, rows, cols).
        inserted: The model adds something to the stream behind this block.
    """

    path: str
    parts: MappingProxyType[str, str] = field(repr=False)
    kind: str
    norm: Literal["pre", "post"]
    scales: MappingProxyType[str, tuple[str, str]] = field(repr=False)
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    rotary: bool
    row_mask: bool
    map: bool
    inserted: bool = False

    @property
    def attention(self) -> str:
        """Path of the attention module in the transformers model."""
        return f"{self.path}.{self.parts.get('attn', self.parts.get('xattn'))}"

    @property
    def cross_only(self) -> bool:
        """A block that only attends to the image; it does not run without one."""
        return "xattn" in self.parts and "attn" not in self.parts


@dataclass(frozen=True)
class Stack(StackConfig):
    """A stack of blocks with its place.

    Attributes:
        owner: Path of the module that runs the blocks.
        blocks: In execution order.
        packed: All images' patches lie in one sequence (patches, d), each image attending to itself.
        embed_norm: Path of a norm between the embedding and the first block, or None.
    """

    owner: str
    blocks: tuple[Block, ...] = field(repr=False)
    embed_norm: str | None
    packed: bool = False


PREFIXES = {"text": "", "encoder": "encoder.", "vision": "vision."}
"""Stream -> what its hook names begin with."""


@dataclass(frozen=True)
class Structure:
    """Module paths of one model, the token that marks image positions, and how positions are counted.

    Attributes:
        family: `config.model_type`.
        text: The decoder's blocks.
        encoder: The text encoder's blocks of an encoder-decoder, which then hold the image positions.
        vision: The tower's blocks.
        projector: Path of the module from tower features to image tokens.
        projector_out: Module and field that hold the image tokens in picture order, where not the projector's output.
        final_norm: None where blocks normalise after the sum.
        embed: Token embedding.
        unembed: From the final norm to the vocabulary.
        head: Path of the module that calls the unembedding and returns the logits.
        logit_scale: What the unembedding's output is multiplied by.
        logit_cap: Logits become cap * tanh(logits / cap); None for no soft-cap.
        image_token_id: None when the configuration names none.
        cross_attention: Image features are attended to and never stand in the text's sequence.
        plain_positions: Position ids are one number per token (not the three of Qwen-VL's rotary embedding), taken by
            the decoder as an argument, so that they can be counted from the attention mask.
    """

    family: str
    text: Stack
    encoder: Stack | None
    vision: Stack | None
    projector: str | None
    projector_out: tuple[str, str] | None
    final_norm: str | None
    embed: str
    unembed: str
    head: str
    logit_scale: float
    logit_cap: float | None
    image_token_id: int | None
    cross_attention: bool
    plain_positions: bool

    @property
    def stacks(self) -> dict[str, Stack]:
        """Stream name -> stack, in execution order."""
        found = {"vision": self.vision, "encoder": self.encoder, "text": self.text}
        return {name: stack for name, stack in found.items() if stack is not None}


def describe(structure: Structure, d_vocab: int) -> HookedConfig:
    """The sizes of a model."""

    def sizes(stack: Stack) -> dict[str, int]:
        return {field.name: getattr(stack, field.name) for field in fields(StackConfig)}

    vision = StackConfig(**sizes(structure.vision)) if structure.vision else None
    return HookedConfig(**sizes(structure.text), d_vocab=d_vocab, family=structure.family, vision=vision)


def scale_factor(block: nn.Module, scale: tuple[str, str]) -> Tensor:
    """What multiplies a module's output before it is added: a row of SCALES, of a block."""
    parameter, function = scale
    value: Tensor = getattr(block, parameter)
    return torch.tanh(value) if function == "tanh" else value


def submodule(module: Any, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def _first(module: nn.Module, names: Iterable[str]) -> str | None:
    return next((name for name in names if isinstance(submodule(module, name), nn.Module)), None)


def _find_blocks(owner: nn.Module, core: nn.Module, lists: tuple[str, ...], what: str) -> list[list[nn.Module]]:
    """Lists of blocks: by exception, by what transformers records as hidden states, by the lists' names."""
    if lists:
        found: list[list[nn.Module]] = []
        for path in lists:
            if path.endswith(".*"):
                found += [list(stage) for stage in submodule(core, path[:-2])]
            else:
                found.append(list(submodule(core, path)))
        return found
    recorded: Any = (getattr(owner, "_can_record_outputs", None) or {}).get("hidden_states")
    kinds = tuple(kind for kind in (recorded if isinstance(recorded, list) else [recorded]) if isinstance(kind, type))
    if kinds and (blocks := [module for module in owner.modules() if isinstance(module, kinds)]):
        return [blocks]
    name = _first(owner, LAYER_LIST_NAMES)
    if name is None:
        raise UnsupportedModelError(
            f"no blocks found in the {what} {type(owner).__name__}: transformers records no hidden states there and "
            f"none of the attributes {', '.join(LAYER_LIST_NAMES)} exists. Add the name to hooked_mm/architectures.py"
        )
    return [list(submodule(owner, name))]


def _width(module: nn.Module, side: Literal["in_features", "out_features"]) -> int:
    size = getattr(module, side, None)
    if size is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no {side}, so the sizes of this block can't be told; it must be linear"
        )
    return int(size)


def _block(block: nn.Module, path: str, what: str) -> Block:
    found = {role: name for role, names in PART_NAMES.items() if (name := _first(block, names)) is not None}
    missing = [role for role in ("ln1", "ln2", "mlp") if role not in found]
    missing += [] if "attn" in found or "xattn" in found else ["attn"]
    if missing:
        raise UnsupportedModelError(
            f"a block of the {what} ({type(block).__name__}) has no recognised {', '.join(missing)}; it has "
            f"{', '.join(child for child, _ in block.named_children())}. Add the name to PART_NAMES in "
            "hooked_mm/architectures.py"
        )
    if found["ln2"] == "pre_feedforward_layernorm" and submodule(block, "post_attention_layernorm") is not None:
        found["attn_post_norm"] = "post_attention_layernorm"
    module = submodule(block, found.get("attn", found.get("xattn", "")))
    out = found.get("o", found.get("xo"))
    width = _width(submodule(block, out), "in_features") if out else 0
    config = getattr(module, "config", None)
    named = ("num_heads", "num_attention_heads", "n_heads", "groups")
    heads = next((getattr(module, name) for name in named if isinstance(getattr(module, name, None), int)), None)
    head_dim = getattr(module, "head_dim", None)
    if heads is None:
        heads = width // head_dim if head_dim else getattr(config, "num_attention_heads", None)
    if not heads:
        raise UnsupportedModelError(f"the attention {type(module).__name__} of the {what} does not say how many heads")
    d_head = width // heads
    key = found.get("k", found.get("xk"))
    kv_heads = _width(submodule(block, key), "out_features") // d_head if key else heads
    before = getattr(block, "do_layer_norm_before", type(block).__name__ not in POST_NORM_BLOCKS)
    scales = {
        role: next(row for row in rows if getattr(block, row[0], None) is not None)
        for role, rows in SCALES.items()
        if any(getattr(block, name, None) is not None for name, _ in rows)
    }
    layer_type = getattr(module, "layer_type", None) or ("sliding" if getattr(module, "is_sliding", False) else None)
    arguments = inspect.signature(type(module).forward).parameters
    normed = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    mlp_down = submodule(block, found["mlp_down"]) if "mlp_down" in found else None
    return Block(
        path=path,
        parts=MappingProxyType(found),
        kind=type(block).__name__ + (f" ({layer_type})" if layer_type else ""),
        norm="pre" if before else "post",
        scales=MappingProxyType(scales),
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_head=d_head,
        d_model=_width(submodule(block, out), "out_features") if out else 0,
        # An MLP of no known parts (a mixture of experts) has no neurons of its own.
        d_mlp=0 if mlp_down is None else _width(mlp_down, "in_features"),
        rotary="position_embeddings" in arguments
        or any(norm is not None and not isinstance(norm, nn.Identity) for norm in normed),
        row_mask="full_text_row_masked_out_mask" in inspect.signature(type(block).forward).parameters
        and "xattn" in found,
        map="conv1" in found,
    )


def _blocks(
    paths: dict[int, str], lists: list[list[nn.Module]], children: tuple[str, ...], what: str
) -> Iterator[Block]:
    for number, modules in enumerate(lists):
        for index, module in enumerate(modules):
            parts = [submodule(module, child) for child in children] or [module]
            for part in parts:
                block = _block(part, paths[id(part)], what)
                # Between two lists of one width the model does something of its own to the stream.
                last = index == len(modules) - 1 and number < len(lists) - 1 and not children
                yield replace(block, inserted=True) if last else block


def _stack(paths: dict[int, str], owner: nn.Module, blocks: list[Block]) -> Stack:
    last = blocks[-1]
    attention = next(module for module in owner.modules() if paths.get(id(module)) == last.attention)
    norm = _first(owner, EMBED_NORM_NAMES)
    return Stack(
        owner=paths[id(owner)],
        blocks=tuple(blocks),
        embed_norm=f"{paths[id(owner)]}.{norm}" if norm else None,
        packed="cu_seqlens" in inspect.signature(type(attention).forward).parameters,
        n_layers=len(blocks),
        d_model=last.d_model,
        n_heads=last.n_heads,
        n_kv_heads=last.n_kv_heads,
        d_head=last.d_head,
        d_mlp=last.d_mlp,
    )


def _applied(model: Any, config: Any, name: str) -> float | None:
    """A number of the configuration, if the forward uses it: Gemma 3 with images names a soft-cap and does not."""
    value = getattr(config, name, None)
    return value if value is not None and name in inspect.getsource(type(model).forward) else None


def resolve(model: Any) -> Structure:
    """Find the parts of a loaded transformers model (PEFT-wrapped too).

    Raises:
        UnsupportedModelError: If it is not a vision-language model of transformers, or a part is not recognised; the
            message says which and where to add its name.
    """
    # PEFT keeps the transformers model inside; its modules are found by identity, so the paths stay those of `model`.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(inner, "config", None)
    family = getattr(config, "model_type", None)
    vision_config = getattr(config, "vision_config", None)
    if family is None or vision_config is None or not hasattr(inner, "get_decoder"):
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {family!r}) is not a vision-language model of transformers: it has no "
            f"vision_config. Proved families: {', '.join(FAMILIES)}. Other models can be traced with nnsight directly"
        )
    exception = EXCEPTIONS.get(family, Oddity())
    paths = {id(module): path for path, module in model.named_modules()}
    core = getattr(inner, "model", inner)
    decoder, tower = inner.get_decoder(), inner.get_encoder(modality="image")
    encoder = inner.get_encoder() if getattr(config.get_text_config(), "is_encoder_decoder", False) else None
    if encoder is not None and hasattr(decoder, "decoder"):
        decoder = decoder.decoder
    # A language model with its own head inside (OPT in BLIP-2) keeps its blocks one floor further down.
    while _first(decoder, LAYER_LIST_NAMES) is None and decoder.get_decoder() is not decoder:
        decoder = decoder.get_decoder()
    projector = _first(core, PROJECTOR_NAMES)
    if projector is None:
        raise UnsupportedModelError(
            f"no projector found in {type(core).__name__}; known names are {', '.join(PROJECTOR_NAMES)}. Add the name "
            "to hooked_mm/architectures.py"
        )
    norm = _first(decoder, FINAL_NORM_NAMES)

    def stack(owner: nn.Module, what: str, lists: tuple[str, ...] = (), children: tuple[str, ...] = ()) -> Stack:
        found = list(_blocks(paths, _find_blocks(owner, core, lists, what), children, what))
        return _stack(paths, owner, found)

    text = stack(decoder, "decoder")
    inserts = len(getattr(vision_config, "deepstack_visual_indexes", None) or ())
    if inserts and hasattr(decoder, "_deepstack_process"):
        changed = [replace(block, inserted=i < inserts) for i, block in enumerate(text.blocks)]
        text = _stack(paths, decoder, changed)
    arguments = inspect.signature(type(decoder).forward).parameters
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    out = exception.projector_out
    unembed = paths[id(inner.get_output_embeddings())]
    text_config = config.get_text_config()
    return Structure(
        family=family,
        text=text,
        encoder=stack(encoder, "text encoder") if encoder is not None else None,
        vision=stack(tower, "vision tower", exception.vision_blocks, exception.block_children),
        projector=paths[id(submodule(core, projector))],
        projector_out=(paths[id(submodule(core, out[0]))], out[1]) if out else None,
        final_norm=paths[id(submodule(decoder, norm))] if norm else None,
        embed=paths[id(inner.get_input_embeddings())],
        unembed=unembed,
        head=unembed.rpartition(".")[0],
        logit_scale=_applied(inner, text_config, "logit_scale") or 1.0,
        logit_cap=_applied(inner, text_config, "final_logit_softcapping"),
        image_token_id=getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None),
        cross_attention=any(block.cross_only for block in text.blocks),
        plain_positions="rope_theta" in str(rope) and "mrope_section" not in str(rope) and "position_ids" in arguments,
    )
