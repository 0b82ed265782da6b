"""The parts of a model that are found without running it: also of one whose weights are not there (on the meta device).

`resolve` goes on from here and runs blocks; what only needs the ends of a model, or leaves a part of it out, needs no
more than this.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hooked_mm.adapter_switch import check_modules
from hooked_mm.architectures import (
    COLLAPSE_NAMES,
    EMBED_NORM_NAMES,
    EXCEPTIONS,
    FINAL_NORM_NAMES,
    LAYER_LIST_NAMES,
    STREAM_COUNTS,
    Oddity,
)
from hooked_mm.blocks import first
from hooked_mm.encoders import require_pictures, text_encoder, vision_config, vision_encoder
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.norms import find_norm_formula
from hooked_mm.projectors import find_projector
from hooked_mm.structure import Readout, submodule
from hooked_mm.vocabulary import (
    contains,
    find_embedding,
    find_head,
    find_transform,
    find_unembedding,
    logit_cap,
    logit_scale,
    word_count,
)

_LENGTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers", "decoder_layers")


def length_of(config: Any) -> int | None:
    found = (getattr(config, name, None) for name in _LENGTHS)
    return next((value for value in found if isinstance(value, int)), None)


def block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Path -> blocks, of every list of modules that are alike in plan: parts of their own, one class or few."""
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(path.startswith(f"{p}.") for p in found):
            continue
        items = list(module)
        whole = [sum(1 for _ in item.modules()) > 3 for item in items]
        if items and all(whole) and len({type(item) for item in items}) <= max(1, len(items) // 2):
            found[path] = items
    return found


def by_shape(inner: nn.Module, config: Any, outside: nn.Module | None) -> list[nn.Module] | None:
    """The only list of as many blocks as a configuration says, none of them inside another stack; None if unclear."""
    length = length_of(config)
    taken = {id(module) for module in outside.modules()} if outside is not None else set()
    fitting = [
        blocks
        for blocks in block_lists(inner).values()
        if len(blocks) == length and id(blocks[0]) not in taken and _has_width(blocks[0], config)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _has_width(block: nn.Module, config: Any) -> bool:
    """Whether the block's norms are as wide as the configuration says."""
    width = getattr(config, "hidden_size", None) or getattr(config, "embed_dim", None)
    weights = [weight for child in block.children() if (weight := getattr(child, "weight", None)) is not None]
    return width is None or any(weight.ndim == 1 and weight.shape[0] == width for weight in weights)


def final_norm(decoder: nn.Module) -> nn.Module | None:
    """By name, or the only norm among the decoder's own children."""
    if (name := first(decoder, FINAL_NORM_NAMES)) is not None:
        found: nn.Module = submodule(decoder, name)
        return found
    other = {submodule(decoder, name) for name in EMBED_NORM_NAMES}
    norms = [c for c in decoder.children() if c not in other and find_norm_formula(_with_weights(c)) is not None]
    return norms[0] if len(norms) == 1 else None


def _with_weights(module: nn.Module) -> nn.Module:
    """The module itself, or of one that is all on the meta device a copy with ones for weights: it is to be run."""
    weights = list(module.parameters())
    if not weights or not all(weight.is_meta for weight in weights) or hasattr(module, "_hf_hook"):
        return module
    if any(weight.ndim > 1 for weight in weights):
        return module
    made = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for weight in made.parameters():
            weight.fill_(1)
    return made


def find_decoder(inner: Any, text_config: Any, tower: nn.Module | None) -> nn.Module:
    """The module that runs the text's blocks."""
    decoder = inner.get_decoder()
    if getattr(text_config, "is_encoder_decoder", False) and hasattr(decoder, "decoder"):
        decoder = decoder.decoder
    # A language model with its own head inside (OPT in BLIP-2) keeps its blocks one floor further down.
    while first(decoder, LAYER_LIST_NAMES) is None and hasattr(decoder, "get_decoder"):
        deeper = decoder.get_decoder()
        if deeper is decoder:
            break
        decoder = deeper
    if first(decoder, LAYER_LIST_NAMES) is not None and not (tower is not None and contains(decoder, {id(tower)})):
        found: nn.Module = decoder
        return found
    # A model of its own plan: the smallest module that holds the only list of blocks that fits.
    blocks = by_shape(inner, text_config, tower)
    return decoder if blocks is None else _owner(inner, blocks)


def _owner(inner: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """The module that has a list of blocks as its child."""
    for module in inner.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) and child[0] is blocks[0]:
                return module
    raise AssertionError("a list of blocks lies in no module")


def find_tower(inner: Any, config: Any, vocabulary: int) -> nn.Module | None:
    """The vision tower; None for models without one."""
    found = vision_encoder(inner, vocabulary)
    vision = vision_config(config)
    if found is not None:
        return found
    blocks = None if vision is None else by_shape(inner, vision, None)
    return None if blocks is None else _owner(inner, blocks)


def find_lists(
    owner: nn.Module, core: nn.Module, config: Any, lists: tuple[str, ...], what: str
) -> list[list[nn.Module]]:
    """Lists of blocks: by exception, by what transformers records as hidden states, by the lists' names, by shape.

    Args:
        owner: The stack's module, as far as it is known.
        core: The model that exceptions' paths are relative to.
        config: The stack's configuration.
        lists: An exception's paths; `.*` at the end for a list of lists.
        what: The stack, for messages.

    Raises:
        UnsupportedModelError: If there are none.
    """
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
    name = first(owner, LAYER_LIST_NAMES)
    if name is not None:
        return [list(submodule(owner, name))]
    alike = by_shape(owner, config, None)
    if alike is None and length_of(config) is None and (towers := list(block_lists(owner).values())):
        # Towers one behind the other: the last is the one that the projector reads.
        return [towers[-1]]
    if alike is None:
        raise UnsupportedModelError(
            f"no blocks found in the {what} {type(owner).__name__}: transformers records no hidden states there, none "
            f"of the attributes {', '.join(LAYER_LIST_NAMES)} exists, and there is not exactly one list of "
            f"{length_of(config)} blocks. Add the name to hooked_mm/architectures.py"
        )
    return [alike]


def _has_blocks(tower: nn.Module, core: nn.Module, config: Any, exception: Oddity) -> bool:
    """Whether a tower is a stack of blocks, and not folds of pixels (Inkling) or stages of convolutions (FastViT)."""
    try:
        lists = find_lists(tower, core, config, exception.vision_blocks, "vision tower")
    except UnsupportedModelError:
        return False
    return not any(first(item, LAYER_LIST_NAMES) for items in lists for item in items) or bool(exception.block_children)


class LeftOut(nn.Module):
    """Stands where a part was that this model was loaded without.

    Args:
        path: Of the part.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise BadInputError(f"this model was loaded without its {self.path!r}, which pictures need: leave tower=False")


@dataclass(frozen=True)
class Skeleton:
    """The modules of one model by what they are, None for what it lacks.

    Attributes:
        inner: The transformers model; PEFT keeps it inside.
        config: Its configuration.
        family: `config.model_type`.
        exception: Its row of EXCEPTIONS.
        core: The model that exceptions' paths are relative to.
        tower: The vision tower.
        projector: From tower features to image tokens; a tower without blocks is one.
        decoder: What runs the text's blocks.
        encoder: What runs the blocks of a text encoder.
        embed: The token embedding.
        norm: The final norm, or what stands in its place in a head of several parts.
        collapse: What makes one stream of several before the final norm.
        streams: How many streams the configuration names, 1 unless it does.
        unembed: From the final norm to the vocabulary.
        left_out: Paths of the parts that the model was loaded without.
    """

    inner: Any
    config: Any
    family: str
    exception: Oddity
    core: nn.Module
    tower: nn.Module | None
    projector: nn.Module | None
    decoder: nn.Module
    encoder: nn.Module | None
    embed: nn.Module
    norm: nn.Module | None
    collapse: nn.Module | None
    streams: int
    unembed: nn.Module
    left_out: tuple[str, ...]


def skeleton(model: Any) -> Skeleton:
    """Find the parts of a transformers model (PEFT-wrapped too) that need no run.

    Raises:
        UnsupportedModelError: As `resolve`.
    """
    # PEFT keeps the transformers model inside; its modules are found by identity, so the paths stay those of `model`.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for adapter in (getattr(model, "peft_config", None) or {}).values():
        check_modules(adapter)
    config: Any = getattr(inner, "config", None)
    family = getattr(config, "model_type", None)
    if family is None or not hasattr(inner, "get_decoder"):
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {family!r}) is not a vision-language model of transformers. "
            "`hooked-mm models` lists what is known; other models can be traced with nnsight directly"
        )
    exception = EXCEPTIONS.get(family, Oddity())
    if exception.refused:
        raise UnsupportedModelError(f"{type(model).__name__} (model type {family!r}): {exception.refused}")
    paths = {id(module): path for path, module in model.named_modules()}
    core = getattr(inner, "model", None) or getattr(inner, "base_model", inner)
    text_config, tower_config = config.get_text_config(), vision_config(config)
    if getattr(text_config, "vocab_size", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {family!r}) names no vocabulary: it gives no logits over words"
        )
    left_out = tuple(path for path, module in model.named_modules() if isinstance(module, LeftOut))
    tower = seen = find_tower(inner, config, text_config.vocab_size)
    if not left_out:
        require_pictures(inner, tower)
    apart = tower is None or left_out or _has_blocks(tower, core, tower_config, exception)
    bare = None if apart else tower
    tower = None if bare is not None else tower
    decoder = find_decoder(inner, text_config, tower)
    encoder = text_encoder(inner, seen if left_out else tower)
    embed, unembed = (find(inner, text_config.vocab_size) for find in (find_embedding, find_unembedding))
    norm = final_norm(decoder) or find_transform(model, paths[id(unembed)], decoder)
    projector = find_projector(core, [decoder, tower, embed, unembed, norm, encoder], config, exception) or bare
    collapse = first(decoder, COLLAPSE_NAMES)
    counts = (getattr(text_config, name, None) for name in STREAM_COUNTS)
    return Skeleton(
        inner=inner,
        config=config,
        family=family,
        exception=exception,
        core=core,
        tower=None if left_out else tower,
        projector=None if left_out else projector,
        decoder=decoder,
        encoder=encoder,
        embed=embed,
        norm=norm,
        collapse=None if collapse is None else submodule(decoder, collapse),
        streams=next((count for count in counts if count), 1),
        unembed=unembed,
        left_out=left_out,
    )


def readout(model: nn.Module, parts: Skeleton) -> Readout:
    """How a stream of this model becomes logits.

    Args:
        model: The model that the paths shall be of.
        parts: Its own skeleton.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    unembed, text_config = paths[id(parts.unembed)], parts.config.get_text_config()
    return Readout(
        final_norm=None if parts.norm is None else paths[id(parts.norm)],
        collapse=None if parts.collapse is None else paths[id(parts.collapse)],
        streams=parts.streams,
        unembed=unembed,
        logit_scale=logit_scale(
            parts.inner, text_config, model.get_submodule(find_head(model, unembed, parts.decoder))
        ),
        logit_cap=logit_cap(parts.inner, text_config),
        words=word_count(parts.inner, text_config),
    )
