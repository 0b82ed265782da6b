"""Loading a model with its processor and an adapter from files as people have them, whatever their layout.

The checkpoint's config.json says who loads it: a row of LAYOUTS, else transformers' Auto classes. Weights are
safetensors; pickled ones are read by `torch.load(weights_only=True)`, which makes tensors and runs nothing. Code that
lies beside the weights runs only where `trust_remote_code=True` was said.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hooked_mm.adapter_switch import beside_their_base, check_modules
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hub_files import fetch
from hooked_mm.llava_keys import is_llava_original
from hooked_mm.molmo import MolmoConfig
from hooked_mm.processors import load_processor
from hooked_mm.weights import device_of, offloads
from hooked_mm.without_tower import without_tower

SHARED = ("revision", "local_files_only", "token", "cache_dir", "subfolder")
"""Options that say where files are: they reach model and processor; the adapter, too, but for `_OF_ONE_REPOSITORY`."""

OURS = (MolmoConfig.model_type,)
"""Architectures that this package brings; transformers' Auto classes know them (`hooked_mm.molmo`)."""

_OF_ONE_REPOSITORY = ("revision", "subfolder")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

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
    adapter_options: Mapping[str, Any] | None = None,
    merge_adapter: bool = False,
    tower: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """A model, ready to be read, and its processor.

    Args:
        model_id: Hub id or folder: of a model, or of an adapter that names its base model.
        dtype: Of the weights: `"bfloat16"`, `torch.float32`, ..., or `"auto"` for the checkpoint's own.
        device_map: As in transformers; `"auto"` lets accelerate place the layers, where necessary in memory or on disk.
        adapter: Hub id or folder of a PEFT adapter to put into the model (needs PEFT).
        adapter_options: `revision` and `subfolder` of the adapter, which are not the model's.
        merge_adapter: Add the adapter to the weights, rather than run it beside them.
        tower: False leaves out what only pictures need: neither read nor kept, so that only texts can be run.
        trust_remote_code: Run Python code that lies beside the weights.
        options: Passed on to transformers' `from_pretrained` (`revision`, `local_files_only`, `quantization_config`,
            `offload_folder`, ...).

    Raises:
        BadInputError: If files are missing, can't be had offline, or hold a pickle that is more than tensors; if an
            adapter is wanted without PEFT.
        UnsupportedModelError: If only remote code knows the architecture; if an adapter is one of prompts; if it can't
            be loaded without its tower.
    """
    if options.get("weights_only") is False:
        raise BadInputError("weights_only=False would run whatever a pickled checkpoint holds; leave it out")
    name, shared = str(model_id), where(options)
    told = dict(adapter_options or {})
    with _explained(name):
        if adapter is None and (base := _base_of(name, shared)) is not None:
            adapter, name = name, base
            told = {key: options.pop(key) for key in _OF_ONE_REPOSITORY if key in options} | told
        written, _ = PretrainedConfig.get_config_dict(name, **where(options))
        if not written:
            raise FileNotFoundError("it has no config.json.")
        # The code that Molmo's published files name was written for another version, and is never needed.
        trust_remote_code = trust_remote_code and written.get("model_type") not in OURS
        load = next((load for fits, load in LAYOUTS if fits(written)), load_auto if tower else load_text)
        if not tower and (load is not load_text or trust_remote_code):
            raise UnsupportedModelError(
                f"{name!r} can't be loaded without its tower: its layout, or code of its own, loads it; "
                "leave out tower=False"
            )
        if load in (load_auto, load_text) and not trust_remote_code:
            _refuse_remote_code(name, written)
        model, processor = load(
            name, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, **options
        )
    if adapter is not None:
        told = {key: value for key, value in shared.items() if key not in _OF_ONE_REPOSITORY} | told
        with _explained(str(adapter)):
            model = with_adapter(model, adapter, merge=merge_adapter, **told)
    return model.requires_grad_(False).eval(), processor


def _base_of(name: str, shared: Mapping[str, Any]) -> str | None:
    """The model that an adapter names as its base; None for what has a config.json, which is a model."""

    def written(**file: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = PretrainedConfig.get_config_dict(name, **file, **shared)[0]
        except OSError:
            return {}
        return found

    if written() or not (named := written(_configuration_file="adapter_config.json")):
        return None
    if not named.get("base_model_name_or_path"):
        raise BadInputError(
            f"{name!r} holds an adapter alone, and it names no base model; give the model, and this as adapter="
        )
    return str(named["base_model_name_or_path"])


def _refuse_remote_code(name: str, config: Mapping[str, Any]) -> None:
    """Refuse an architecture that transformers lacks."""
    kind = config.get("model_type")
    if kind in (*CONFIG_MAPPING_NAMES, *OURS) or "AutoConfig" not in (config.get("auto_map") or {}):
        return
    raise UnsupportedModelError(
        f"{name!r} is of model type {kind!r}, which this transformers does not know: it brings Python code of its own "
        f"({config['auto_map']['AutoConfig']}), which has not been run. Read that code; to run it, pass "
        "trust_remote_code=True"
    )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Errors of files, with what to do."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise BadInputError(
            f"the weights of {name!r} are a pickle that holds more than tensors, and loading it would run what it "
            "holds; nothing was run. Use safetensors: another revision may have them, or convert the file where you "
            "trust it"
        ) from error
    except OSError as error:
        said = " ".join(str(error).split())
        if Path(name).exists():
            advice = "a model's folder holds config.json, weights (*.safetensors) and its processor's files"
        elif name.count("/") > 1:
            advice = "there is no such folder"
        else:
            advice = (
                "check the name (there is no such folder here); offline (local_files_only, HF_HUB_OFFLINE) every file "
                f"must be in the cache, where `hf download {name}` puts it while there is a network"
            )
        raise BadInputError(f"{name!r} can't be loaded: {said} Remedy: {advice}") from error
    except ValueError as error:
        if isinstance(error, BadInputError) or "trust_remote_code" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{name!r} needs Python code of its own, which has not been run: {' '.join(str(error).split())}"
        ) from error


def with_adapter(model: Any, adapter: str | Path | None, *, merge: bool = False, **options: Any) -> Any:
    """A transformers model with a PEFT adapter put into it: its modules are replaced in place.

    Args:
        model: A loaded transformers model.
        adapter: Hub id or folder; None leaves the model as it is.
        merge: Add the adapter to the weights: what comes back is a plain transformers model.
        options: Where the adapter's files are (`revision`, `subfolder`, `token`, ...).

    Raises:
        BadInputError: If PEFT is not installed, or there is no such adapter.
        UnsupportedModelError: If it is an adapter of prompts.
    """
    if adapter is None:
        return model
    try:
        from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise BadInputError(
            f"the adapter {str(adapter)!r} needs PEFT, which is not installed; pip install peft"
        ) from error
    # PEFT itself asks the hub for some of the files, whatever is said of it.
    inside = options.pop("subfolder", None) or ""
    patterns = [f"{inside}/{name}" if inside else name for name in _ADAPTER_FILES]
    folder = fetch(adapter, patterns, options.pop("revision", None), "adapter", **options) / inside
    if not (folder / "adapter_config.json").is_file():
        raise BadInputError(f"{str(folder)!r} holds no adapter: there is no adapter_config.json, which PEFT writes")
    check_modules(PeftConfig.from_pretrained(str(folder)))
    away = any(map(offloads, model.modules()))
    if merge and away:
        raise BadInputError(
            f"the adapter {str(adapter)!r} can't be merged into weights that are partly offloaded to memory or disk; "
            "leave it live (merge_adapter=False), or merge and save the model once without device_map"
        )
    # PEFT would place the whole model anew; accelerate's hooks stay on the modules that it wraps.
    device_map = model.__dict__.pop("hf_device_map", None)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), torch_device=str(device_of(model)))
    finally:
        if device_map is not None:
            model.hf_device_map = device_map
    if merge:
        return adapted.merge_and_unload()
    if away:
        # It makes what it adds where the base's weights are: nowhere, now. Filled a second time, it has its numbers.
        beside_their_base(adapted)
        set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    return adapted
