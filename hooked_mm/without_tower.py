"""A vision-language model loaded without its tower: for texts without pictures, only what these need is read.

Left out is every part that belongs to neither decoder nor text encoder, nor to the vocabulary: tower, projector,
resamplers. In their places stand modules without weights that say so when they are called (`skeleton.LeftOut`).
Loading, dtype, tying and placing are transformers' own: it is given the configuration and the tensors that are wanted.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from hooked_mm.checkpoint import Checkpoint, settled_dtype
from hooked_mm.checkpoint_keys import on_meta, places
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.projectors import leftover
from hooked_mm.skeleton import LeftOut, skeleton

_PLACES = ("revision", "local_files_only", "token", "cache_dir", "subfolder")


def picture_parts(model: Any) -> tuple[str, ...]:
    """Paths of the parts that only pictures need.

    Args:
        model: A transformers model, on the meta device or not.

    Raises:
        UnsupportedModelError: If it has no tower apart from the text.
    """
    parts = skeleton(model)
    claimed = [parts.decoder, parts.encoder, parts.embed, parts.norm, parts.unembed, parts.collapse]
    paths = {id(module): path for path, module in model.named_modules()}
    shared = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    found = [paths[id(module)] for module in leftover(parts.inner, claimed)]
    found = [path for path in found if not any(name.startswith(f"{path}.") for name in shared)]
    apart = {paths[id(module)] for module in (parts.tower, parts.projector) if module is not None}
    if not any(
        path == own or path.startswith(f"{own}.") or own.startswith(f"{path}.") for path in found for own in apart
    ):
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {parts.family!r}) has no vision tower apart from "
            "its decoder that could be left out; load it whole"
        )
    takes = inspect.signature(type(parts.inner).forward).parameters.values()
    needed = [item.name for item in takes if "pixel" in item.name and item.default is inspect.Parameter.empty]
    reads_pictures = parts.encoder is None and getattr(parts.config, "is_encoder_decoder", False)
    if needed or reads_pictures:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {parts.family!r}) runs on no text without a picture"
            f"{': its encoder is the tower' if reads_pictures else ''}; load it whole"
        )
    return tuple(found)


def leave_out(model: Any, paths: tuple[str, ...]) -> None:
    """Put a `LeftOut` in the place of these parts."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner).register_module(name, LeftOut(path))
    there = model.state_dict()
    tied = model.all_tied_weights_keys
    model.all_tied_weights_keys = {one: other for one, other in tied.items() if one in there and other in there}


def without_tower(
    model_id: str | Path, *, dtype: str | torch.dtype = "auto", device_map: Any = None, **options: Any
) -> tuple[Any, Checkpoint]:
    """The model without the parts that only pictures need, and what was read of its checkpoint.

    Args:
        model_id: Hub id or folder.
        dtype: Of the weights; `"auto"` for the checkpoint's own.
        device_map: As in transformers; nothing can be offloaded to the disk.
        options: Where the files are, and what else transformers' `from_pretrained` takes.

    Raises:
        UnsupportedModelError: If the model has no tower apart.
        BadInputError: If the checkpoint lacks what the text needs; it names the tensors.
    """
    files = {name: options.pop(name) for name in _PLACES if name in options}
    config = AutoConfig.from_pretrained(str(model_id), **files)
    checkpoint = Checkpoint(model_id, **files)
    kind = settled_dtype(checkpoint, config, dtype)
    whole = on_meta(config, kind)
    paths = picture_parts(whole)
    own: Any = type(whole)

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        own.__init__(self, *args, **kwargs)
        leave_out(self, paths)

    # By the class's own name, which tells transformers what its checkpoints call things.
    partial: Any = type(own.__name__, (own,), {"__init__": build, "__module__": own.__module__})
    wanted = [
        name
        for name, place in places(whole, checkpoint.shards).items()
        if not any(place.name.startswith(f"{path}.") for path in paths)
    ]
    model, info = partial.from_pretrained(
        None,
        config=config,
        state_dict=checkpoint.lazy(wanted),
        dtype=kind,
        device_map=device_map,
        output_loading_info=True,
        **options,
    )
    model.__class__ = own
    if missing := sorted(info["missing_keys"]):
        raise BadInputError(
            f"the checkpoint {str(model_id)!r} lacks {len(missing)} tensors of {own.__name__}: {', '.join(missing[:5])}"
        )
    model.config._name_or_path = model.name_or_path = str(model_id)
    # Models without such a file generate by their configuration.
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(str(model_id), **files)
    return model, checkpoint
