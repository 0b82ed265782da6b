"""Loading a model with its processor and an adapter from files as people have them, whatever their layout.

The folder's config.json says who loads it: a row of LAYOUTS, else transformers' Auto classes. Weights are safetensors;
pickled ones are read by `torch.load(weights_only=True)`, which makes tensors and runs nothing. Code that lies beside
the weights runs only where `trust_remote_code=True` was said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig

from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.llava_keys import is_llava_original
from hooked_mm.processors import load_processor
from hooked_mm.without_tower import without_tower

SHARED = ("revision", "local_files_only", "token", "cache_dir", "subfolder")
"""Options that say where files are: they reach the model and its processor."""

Loader = Callable[..., tuple[Any, Any]]
"""(model_id, dtype=, device_map=, trust_remote_code=, revision=, ...) -> the model and its processor."""


def where(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call's options that say where files are."""
    return {name: options[name] for name in SHARED if name in options}


def load_auto(
    model_id: str, *, dtype: Any, device_map: Any, trust_remote_code: bool = False, **options: Any
) -> tuple[Any, Any]:
    """By transformers' Auto classes."""
    model = AutoModelForImageTextToText.from_pretrained(
        model_id, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, **options
    )
    return model, load_processor(model_id, trust_remote_code=trust_remote_code, **where(options))


def load_llava(model_id: str, **options: Any) -> tuple[Any, Any]:
    """LLaVA as its authors published it."""
    from hooked_mm.llava_originals import load_llava_original

    return load_llava_original(model_id, **options)


def load_text(model_id: str, *, trust_remote_code: bool = False, **options: Any) -> tuple[Any, Any]:
    """Without its tower."""
    return without_tower(model_id, **options)[0], load_processor(model_id, **where(options))


LAYOUTS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Loader], ...] = ((is_llava_original, load_llava),)
"""Whether a config.json is of this layout, and who loads it. Loaders import what they need when they are called."""


def load_model(
    model_id: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    adapter: str | Path | None = None,
    merge_adapter: bool = False,
    tower: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """A model, ready to be read, and its processor.

    Args:
        model_id: Hub id or folder.
        dtype: Of the weights; `"auto"` for the checkpoint's own.
        device_map: As in transformers.
        adapter: Hub id or folder of a PEFT adapter.
        merge_adapter: Add the adapter to the weights, rather than keep it beside them.
        tower: False leaves out what only pictures need: neither read nor kept, so that only texts can be run.
        trust_remote_code: Run code that lies beside the weights.
        options: Passed on to `from_pretrained`.
    """
    written, _ = PretrainedConfig.get_config_dict(str(model_id), **where(options))
    load = next((load for fits, load in LAYOUTS if fits(written)), load_auto if tower else load_text)
    if not tower and (load is not load_text or trust_remote_code):
        raise UnsupportedModelError(
            f"{str(model_id)!r} can't be loaded without its tower: its layout, or code of its own, loads it; "
            "leave tower=False"
        )
    model, processor = load(
        str(model_id), dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, **options
    )
    model = with_adapter(model, adapter, merge=merge_adapter)
    return model.requires_grad_(False).eval(), processor


def with_adapter(model: Any, adapter: str | Path | None, *, merge: bool = False, **options: Any) -> Any:
    """A transformers model with a PEFT adapter put into it: its modules are replaced in place.

    Args:
        model: A loaded transformers model.
        adapter: Hub id or folder; None leaves the model as it is.
        merge: Add the adapter to the weights: what comes back is a plain transformers model.
        options: Where the adapter's files are (`revision`, `token`, ...).

    Raises:
        BadInputError: If PEFT is not installed.
    """
    if adapter is None:
        return model
    try:
        from peft import PeftModel
    except ImportError as error:
        raise BadInputError(
            f"the adapter {str(adapter)!r} needs PEFT, which is not installed; pip install peft"
        ) from error
    adapted = PeftModel.from_pretrained(model, str(adapter), **options)
    return adapted.merge_and_unload() if merge else adapted
