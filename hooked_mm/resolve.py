"""Finds the parts of a transformers model: its stacks of blocks, projector, norms and embeddings.

In this order: transformers' own conventions (`get_decoder`, `get_encoder`, `get_output_embeddings`,
`_can_record_outputs`); the names in the tables of `architectures`; shapes (the list of as many equal blocks as the
configuration says, the one part that belongs to nothing else); one run of a block to see what flows where (`flow`); and
a row of EXCEPTIONS. `conformance` judges the outcome, whatever found it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hooked_mm.architectures import (
    COLLAPSE_NAMES,
    EMBED_NORM_NAMES,
    EXCEPTIONS,
    FINAL_NORM_NAMES,
    IMAGE_TOKEN_NAMES,
    LAYER_LIST_NAMES,
    PART_NAMES,
    STREAM_COUNTS,
    Oddity,
)
from hooked_mm.blocks import Flow, find_block, first, with_cross_blocks
from hooked_mm.encoders import encoder_config, require_pictures, text_encoder, vision_config, vision_encoder
from hooked_mm.errors import UnsupportedModelError
from hooked_mm.flow import Wired, captured, wire
from hooked_mm.norms import find_norm_formula
from hooked_mm.projectors import find_projector, image_tokens_field, layered, runs_in_a_loop
from hooked_mm.structure import Block, Stack, Structure, submodule
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
_PROBE = 6
"""Positions of the run that shows what flows through a block."""


def _length(config: Any) -> int | None:
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


def _by_shape(inner: nn.Module, config: Any, outside: nn.Module | None) -> list[nn.Module] | None:
    """The only list of as many blocks as a configuration says, none of them inside another stack; None if unclear."""
    length = _length(config)
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
    alike = _by_shape(owner, config, None)
    if alike is None and _length(config) is None and (towers := list(block_lists(owner).values())):
        # Towers one behind the other: the last is the one that the projector reads.
        return [towers[-1]]
    if alike is None:
        raise UnsupportedModelError(
            f"no blocks found in the {what} {type(owner).__name__}: transformers records no hidden states there, none "
            f"of the attributes {', '.join(LAYER_LIST_NAMES)} exists, and there is not exactly one list of "
            f"{_length(config)} blocks. Add the name to hooked_mm/architectures.py"
        )
    return [alike]


def _blocks(
    paths: dict[int, str],
    lists: list[list[nn.Module]],
    children: tuple[str, ...],
    what: str,
    config: Any,
    flow: Flow,
    told: Mapping[str, str],
) -> Iterator[Block]:
    for number, modules in enumerate(lists):
        for index, module in enumerate(modules):
            parts = [submodule(module, child) for child in children] or [module]
            for part in parts:
                block = find_block(part, paths[id(part)], what, config, flow, told)
                # Between two lists of one width the model does something of its own to the stream.
                last = index == len(modules) - 1 and number < len(lists) - 1 and not children
                yield replace(block, inserted=True) if last else block


def _stack(paths: dict[int, str], owner: nn.Module, blocks: list[Block]) -> Stack:
    """The sizes of heads are those of the last block that has some."""
    last = blocks[-1]
    heads = next((block for block in reversed(blocks) if block.n_heads), last)
    neurons = next((block for block in reversed(blocks) if block.d_mlp), last)
    width = next((block.d_model for block in reversed(blocks) if block.d_model), 0)
    mixing = {block.mixing for block in blocks} - {None}
    mixers = [module for module in owner.modules() if paths.get(id(module)) in mixing]
    norm = first(owner, EMBED_NORM_NAMES)
    return Stack(
        owner=paths[id(owner)],
        blocks=tuple(replace(block, d_model=block.d_model or width) for block in blocks),
        embed_norm=f"{paths[id(owner)]}.{norm}" if norm else None,
        packed=any("cu_seqlens" in inspect.signature(type(mixer).forward).parameters for mixer in mixers),
        n_layers=len(blocks),
        d_model=last.d_model or width,
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        d_head=heads.d_head,
        d_mlp=neurons.d_mlp,
    )


def _flow(*runs: Callable[[], Any]) -> Flow:
    """What flows through blocks when their stack runs, in the first of these runs that reaches them; once per build."""
    known: dict[Any, Wired | None] = {}

    def flow(block: nn.Module, names: Mapping[str, str]) -> Wired | None:
        build = (type(block), *((name, type(module)) for name, module in block.named_modules()))
        if build not in known:
            found = next((found for run in runs if (found := captured(block, run)) is not None), None)
            known[build] = None if found is None else wire(found, names)
        return known[build]

    return flow


def _run_text(decoder: nn.Module, embed: nn.Module, vocabulary: int) -> Callable[[], Any]:
    """A decoder shown the embeddings of a few tokens (and, if it asks for that, as many states of an encoder)."""
    arguments = inspect.signature(type(decoder).forward).parameters

    def run() -> Any:
        value = embed(torch.arange(vocabulary - _PROBE, vocabulary, device=next(embed.parameters()).device)[None])
        more = {"encoder_hidden_states": _states(decoder, value)} if "encoder_hidden_states" in arguments else {}
        quiet = {"use_cache": False} if "use_cache" in arguments or "kwargs" in arguments else {}
        return decoder(inputs_embeds=value, **more, **quiet)

    return run


def _states(decoder: nn.Module, value: Tensor) -> Tensor:
    """States of an encoder, as wide as cross-attention's keys are projected from."""
    keys = [submodule(module, name) for module in decoder.modules() if (name := first(module, PART_NAMES["xk"]))]
    width = next((key.in_features for key in keys if isinstance(key, nn.Linear)), value.shape[-1])
    return value.repeat(1, 1, -(-width // value.shape[-1]))[..., :width]


def _run_whole(inner: nn.Module, vocabulary: int) -> Callable[[], Any]:
    """The whole model shown a few tokens and no picture."""

    def run() -> Any:
        device = next(inner.parameters()).device
        return inner(input_ids=torch.arange(vocabulary - _PROBE, vocabulary, device=device)[None])

    return run


def _run_tower(tower: nn.Module, config: Any) -> Callable[[], Any]:
    """A tower shown one random picture of the size that its configuration names."""

    def run() -> Any:
        size: Any = getattr(config, "image_size", None) or 8 * config.patch_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        own = next(tower.parameters())
        generator = torch.Generator().manual_seed(0)
        return tower(torch.randn(1, 3, height, width, generator=generator).to(own.device, own.dtype))

    return run


def _final_norm(decoder: nn.Module) -> nn.Module | None:
    """By name, or the only norm among the decoder's own children."""
    if (name := first(decoder, FINAL_NORM_NAMES)) is not None:
        found: nn.Module = submodule(decoder, name)
        return found
    other = {submodule(decoder, name) for name in EMBED_NORM_NAMES}
    norms = [child for child in decoder.children() if child not in other and find_norm_formula(child) is not None]
    return norms[0] if len(norms) == 1 else None


def _decoder(inner: Any, text_config: Any, tower: nn.Module | None) -> nn.Module:
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
    blocks = _by_shape(inner, text_config, tower)
    return decoder if blocks is None else _owner(inner, blocks)


def _owner(inner: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """The module that has a list of blocks as its child."""
    for module in inner.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) and child[0] is blocks[0]:
                return module
    raise AssertionError("a list of blocks lies in no module")


def _tower(inner: Any, config: Any, vocabulary: int) -> nn.Module | None:
    """The vision tower; None for models without one."""
    found = vision_encoder(inner, vocabulary)
    vision = vision_config(config)
    if found is not None:
        return found
    blocks = None if vision is None else _by_shape(inner, vision, None)
    return None if blocks is None else _owner(inner, blocks)


def _inserted(config: Any, vision_config: Any, decoder: nn.Module) -> set[int]:
    """The text blocks behind which the model adds image features: the first few, or those before layers it names."""
    if hasattr(decoder, "_deepstack_process"):
        return set(range(len(getattr(vision_config, "deepstack_visual_indexes", None) or ())))
    if not (pairs := layered(config)):
        return set()
    entered = {text for _, text in pairs} | set(getattr(config, "spatial_target_layers", None) or ())
    return {layer - 1 for layer in entered if layer}


def _has_blocks(tower: nn.Module, core: nn.Module, config: Any, exception: Oddity) -> bool:
    """Whether a tower is a stack of blocks, and not folds of pixels (Inkling) or stages of convolutions (FastViT)."""
    try:
        lists = find_lists(tower, core, config, exception.vision_blocks, "vision tower")
    except UnsupportedModelError:
        return False
    return not any(first(item, LAYER_LIST_NAMES) for items in lists for item in items) or bool(exception.block_children)


def _looped(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return runs_in_a_loop(model.get_submodule(owner), name)


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
    tower = _tower(inner, config, text_config.vocab_size)
    require_pictures(inner, tower)
    bare = tower if tower is not None and not _has_blocks(tower, core, tower_config, exception) else None
    tower = None if bare is not None else tower
    decoder = _decoder(inner, text_config, tower)
    encoder = text_encoder(inner, tower)

    def stack(owner: nn.Module, what: str, settings: Any, *runs: Callable[[], Any]) -> Stack:
        odd = exception if owner is tower else Oddity()
        named = exception.text_blocks if owner is decoder else odd.vision_blocks
        told = exception.parts if owner is decoder else odd.vision_parts
        lists = find_lists(owner, core, settings, named, what)
        lists = lists if owner is tower else [with_cross_blocks(owner, blocks) for blocks in lists]
        found = list(_blocks(paths, lists, odd.block_children, what, settings, _flow(*runs), told))
        return _stack(paths, owner, found)

    def ended(made: Stack, owner: nn.Module) -> Stack:
        found = _final_norm(owner)
        return made if found is None else replace(made, final_norm=paths[id(found)])

    embed, unembed = (find(inner, text_config.vocab_size) for find in (find_embedding, find_unembedding))
    runs = (_run_text(decoder, embed, text_config.vocab_size), _run_whole(inner, text_config.vocab_size))
    text = stack(decoder, "decoder", text_config, *runs)
    if inserts := _inserted(config, tower_config, decoder):
        changed = [replace(block, inserted=i in inserts) for i, block in enumerate(text.blocks)]
        text = _stack(paths, decoder, changed)
    collapse = first(decoder, COLLAPSE_NAMES)
    if any(block.wiring == "streams" for block in text.blocks):
        counts = (getattr(text_config, name, None) for name in STREAM_COUNTS)
        text = replace(text, streams=next((count for count in counts if count), 1))
    norm = _final_norm(decoder) or find_transform(model, paths[id(unembed)], decoder)
    projector = find_projector(core, [decoder, tower, embed, unembed, norm, encoder], config, exception) or bare
    out = image_tokens_field(core, tower, projector, tower_config, exception)
    path = None if projector is None else paths[id(projector)]
    looped = path is not None and out is None and _looped(model, path)
    head = find_head(model, paths[id(unembed)], decoder)
    arguments = inspect.signature(type(decoder).forward).parameters
    rope = getattr(text_config, "rope_parameters", None) or {}
    tokens = (getattr(config, name, None) for name in (exception.image_token, *IMAGE_TOKEN_NAMES) if name)
    attended = any(block.cross_only or (not encoder and "xattn" in block.parts) for block in text.blocks)
    words = seen = None
    if encoder is not None:
        run = _run_text(encoder, embed, text_config.vocab_size)
        words = ended(stack(encoder, "text encoder", encoder_config(config), run), encoder)
    if tower is not None:
        seen = stack(tower, "vision tower", tower_config, _run_tower(tower, tower_config))
        seen = ended(seen, tower) if attended and projector is None else seen
    return Structure(
        no_generation=exception.no_generation,
        collapse=None if collapse is None else f"{paths[id(decoder)]}.{collapse}",
        family=family,
        text=text,
        encoder=words,
        vision=seen,
        projector=None if looped else path,
        projector_out=(paths[id(out[0])], out[1]) if out else None,
        projector_each=path if looped else None,
        final_norm=None if norm is None else paths[id(norm)],
        embed=paths[id(embed)],
        unembed=paths[id(unembed)],
        head=head,
        logit_scale=logit_scale(inner, text_config, model.get_submodule(head)),
        logit_cap=logit_cap(inner, text_config),
        words=word_count(inner, text_config),
        image_token_id=next((token for token in tokens if token is not None), None),
        cross_attention=attended,
        plain_positions="rope_theta" in str(rope) and "mrope_section" not in str(rope) and "position_ids" in arguments,
    )
