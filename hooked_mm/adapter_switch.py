"""An adapter in a model, on and off: the base model read through its adapted sibling, without loading it again.

PEFT keeps base weights beside what an adapter adds, so that switching the adapter off gives the base model's values bit
for bit. Not so for adapters that change the base itself: `lasting` tells them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.weights import device_of

HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Starts of a LoRA's weights that leave the base as it is; others (PiSSA, OLoRA, ...) take from it what they add."""


def _layers(model: nn.Module) -> list[Any]:
    """Modules that an adapter has replaced; in a transformers model of its own, `disable_adapters` is a method."""
    return [part for part in model.modules() if isinstance(getattr(part, "disable_adapters", None), bool)]


def adapters_on(model: Any) -> list[str]:
    """Names of the PEFT adapters that take part in the model's forward pass, sorted; also where PEFT has put them into
    the model from outside."""
    if getattr(model, "_adapters_disabled", False):
        return []
    layers = _layers(model)
    if not layers:
        # Adapters that are prompts replace no module.
        return sorted([model.active_adapter] if getattr(model, "peft_config", None) else [])
    return sorted({name for layer in layers if not layer.disable_adapters for name in layer.active_adapters})


def read_config(adapter: str | Path) -> Any:
    """The PEFT configuration of an adapter, by hub id or folder.

    Raises:
        BadInputError: If PEFT is not installed.
    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise BadInputError(f"the adapter {str(adapter)!r} needs PEFT; pip install peft") from error
    return PeftConfig.from_pretrained(str(adapter))


def lasting(config: Any) -> str | None:
    """Why an adapter of this configuration leaves traces when it is switched off; None if it leaves none."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        return f"it is no change of modules ({config.peft_type})"
    if (bias := getattr(config, "bias", "none")) != "none":
        return f"it has changed biases of the base model (bias={bias!r})"
    if (start := getattr(config, "init_lora_weights", None)) not in HARMLESS_STARTS:
        return f"it has changed weights of the base model (init_lora_weights={start!r})"
    return None


def beside_their_base(model: nn.Module) -> None:
    """Make room for what adapters add where the modules that they wrap compute, if it is nowhere (on "meta").

    It is filled with NaN: numbers have to follow.
    """
    for layer in _layers(model):
        base = layer.get_base_layer()
        device, own = device_of(base), {id(inner) for inner in base.modules()}
        for inner in layer.modules():
            for name, weight in inner.named_parameters(recurse=False):
                if weight.is_meta and id(inner) not in own:
                    room = torch.full(weight.shape, torch.nan, dtype=weight.dtype, device=device)
                    inner.register_parameter(name, nn.Parameter(room, requires_grad=weight.requires_grad))


def check_modules(config: Any) -> None:
    """Refuse an adapter that puts virtual tokens before a prompt: positions would not be those of the batch.

    Raises:
        UnsupportedModelError: It says which kind.
    """
    if config.is_prompt_learning:
        raise UnsupportedModelError(
            f"an adapter of kind {getattr(config.peft_type, 'value', config.peft_type)} puts learned tokens, or their "
            "keys and values, before every prompt: hooks would meet positions that the batch does not have. Use one "
            "that changes modules (LoRA, DoRA, IA3, ...)"
        )


def check_switchable(model: Any) -> None:
    """Refuse a model whose adapters can't be switched off without a trace.

    Raises:
        BadInputError: It says why, and what to do.
    """
    found, layers = adapters_on(model), _layers(model)
    why: str | None = None
    if not found:
        why = "none is on"
    elif not hasattr(model, "disable_adapter"):
        why = "the model is no PeftModel"
    elif any(layer.disable_adapters or getattr(layer, "merged", False) for layer in layers):
        why = "it is merged into some weights, or off in some layers"
    else:
        # Those that are not on have changed the base none the less.
        why = next(filter(None, map(lasting, model.peft_config.values())), None)
    if why is not None:
        raise BadInputError(
            f"the adapter {', '.join(found) or 'of this model'!r} can't be switched off: {why}; load the base model by "
            "itself"
        )


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """While open, the model is its base; afterwards its adapters are on again, whatever happened.

    Args:
        model: A PEFT model that passes `check_switchable`.
    """
    # PEFT makes an adapter trainable when it switches it on.
    trainable = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for weight, before in trainable:
            weight.requires_grad_(before)
