"""Which tensor of a checkpoint goes where in its model, told by transformers' own renaming: nothing is loaded.

transformers 5 renames what older checkpoints call otherwise (`language_model.model.layers.0` is
`model.language_model.layers.0` today), and merges some tensors into one (experts, fused projections).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint goes.

    Attributes:
        name: Of the parameter or buffer in the model.
        merged: It is not taken as it is, but made into parameters with others, or in pieces; `name` is the first.
    """

    name: str
    merged: bool


def on_meta(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The model of a configuration on the meta device: all modules, no memory for weights.

    Args:
        config: Its configuration.
        dtype: Of its weights; the configuration's own unless given.
    """
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, **({} if dtype is None else {"dtype": dtype}))


def places(model: Any, names: Iterable[str]) -> dict[str, Place]:
    """Where transformers would put each tensor of a checkpoint in this model, whether the model has that or not.

    Args:
        model: A transformers model, on the meta device or not.
        names: Of the checkpoint's tensors.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        # By place, since the names of these arguments have changed.
        own, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if own not in state and name in state:
            own, pattern = name, None
        found[name] = Place(own, pattern is not None)
    return found


def tied(model: Any, name: str) -> list[str]:
    """The names of the parameters that are one with this parameter, itself first."""
    pairs: dict[str, str] = model.all_tied_weights_keys
    source = pairs.get(name, name)
    return list(dict.fromkeys([name, source, *(target for target, other in pairs.items() if other == source)]))


def kept_wide(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers keeps this parameter in float32 when the rest of the model is loaded in this dtype."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    kept |= set((getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ())
    return dtype in (torch.float16, torch.bfloat16) and any(f".{part}." in f".{name}." for part in kept)
