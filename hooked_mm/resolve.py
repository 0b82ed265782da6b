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

from hooked_mm.architectures import EMBED_NORM_NAMES, IMAGE_TOKEN_NAMES, PART_NAMES, Oddity
from hooked_mm.blocks import Flow, find_block, first, with_cross_blocks
from hooked_mm.encoders import encoder_config, vision_config
from hooked_mm.flow import Wired, captured, wire
from hooked_mm.projectors import connector_attention, image_tokens_field, layered, runs_in_a_loop
from hooked_mm.skeleton import final_norm, find_lists, readout, skeleton
from hooked_mm.structure import Block, Stack, Structure, submodule
from hooked_mm.vocabulary import find_head
from hooked_mm.weights import device_of, dtype_of

_PROBE = 6
"""Positions of the run that shows what flows through a block."""


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
        value = embed(torch.arange(vocabulary - _PROBE, vocabulary, device=device_of(embed))[None])
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
        return inner(input_ids=torch.arange(vocabulary - _PROBE, vocabulary, device=device_of(inner))[None])

    return run


def _run_tower(tower: nn.Module, config: Any) -> Callable[[], Any]:
    """A tower shown one random picture of the size that its configuration names."""

    def run() -> Any:
        size: Any = getattr(config, "image_size", None) or 8 * config.patch_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        generator = torch.Generator().manual_seed(0)
        return tower(torch.randn(1, 3, height, width, generator=generator).to(device_of(tower), dtype_of(tower)))

    return run


def _inserted(config: Any, vision_config: Any, decoder: nn.Module) -> set[int]:
    """The text blocks behind which the model adds image features: the first few, or those before layers it names."""
    if hasattr(decoder, "_deepstack_process"):
        return set(range(len(getattr(vision_config, "deepstack_visual_indexes", None) or ())))
    if not (pairs := layered(config)):
        return set()
    entered = {text for _, text in pairs} | set(getattr(config, "spatial_target_layers", None) or ())
    return {layer - 1 for layer in entered if layer}


def _looped(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return runs_in_a_loop(model.get_submodule(owner), name)


def resolve(model: Any) -> Structure:
    """Find the parts of a loaded transformers model (PEFT-wrapped too).

    Raises:
        UnsupportedModelError: If it is not a vision-language model of transformers, or a part is not recognised; the
            message says which and where to add its name.
    """
    parts = skeleton(model)
    inner, config, exception, core = parts.inner, parts.config, parts.exception, parts.core
    tower, decoder, encoder, embed = parts.tower, parts.decoder, parts.encoder, parts.embed
    paths = {id(module): path for path, module in model.named_modules()}
    text_config, tower_config = config.get_text_config(), vision_config(config)

    def stack(owner: nn.Module, what: str, settings: Any, *runs: Callable[[], Any]) -> Stack:
        odd = exception if owner is tower else Oddity()
        named = exception.text_blocks if owner is decoder else odd.vision_blocks
        told = exception.parts if owner is decoder else odd.vision_parts
        lists = find_lists(owner, core, settings, named, what)
        lists = lists if owner is tower else [with_cross_blocks(owner, blocks) for blocks in lists]
        found = list(_blocks(paths, lists, odd.block_children, what, settings, _flow(*runs), told))
        return _stack(paths, owner, found)

    def ended(made: Stack, owner: nn.Module) -> Stack:
        found = final_norm(owner)
        return made if found is None else replace(made, final_norm=paths[id(found)])

    runs = (_run_text(decoder, embed, text_config.vocab_size), _run_whole(inner, text_config.vocab_size))
    text = stack(decoder, "decoder", text_config, *runs)
    if inserts := _inserted(config, tower_config, decoder):
        changed = [replace(block, inserted=i in inserts) for i, block in enumerate(text.blocks)]
        text = _stack(paths, decoder, changed)
    if any(block.wiring == "streams" for block in text.blocks):
        text = replace(text, streams=parts.streams)
    projector, end = parts.projector, readout(model, parts)
    out = None if parts.left_out else image_tokens_field(core, tower, projector, tower_config, exception)
    path = None if projector is None else paths[id(projector)]
    looped = path is not None and out is None and _looped(model, path)
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
        collapse=end.collapse,
        family=parts.family,
        text=text,
        encoder=words,
        vision=seen,
        projector=None if looped else path,
        projector_out=(paths[id(out[0])], out[1]) if out else None,
        projector_each=path if looped else None,
        connector=() if looped else connector_attention(core, projector, paths),
        final_norm=end.final_norm,
        embed=paths[id(embed)],
        unembed=end.unembed,
        head=find_head(model, end.unembed, decoder),
        logit_scale=end.logit_scale,
        logit_cap=end.logit_cap,
        words=end.words,
        image_token_id=next((token for token in tokens if token is not None), None),
        cross_attention=attended,
        plain_positions="rope_theta" in str(rope) and "mrope_section" not in str(rope) and "position_ids" in arguments,
        left_out=parts.left_out,
    )
