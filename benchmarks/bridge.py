"""TransformerLens's bridge around a transformers model, for comparison; importing this needs TransformerLens 4."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

# Before it is imported: TransformerLens asks the hub about the names it is given.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge

from hooked_mm.small import small_model_path


def bridge(model: Any) -> TransformerBridge:
    """A bridge over a copy of the model, which it rebuilds in place; attention is eager, as TransformerLens loads it.

    The folder of the small LLaVA stands for the model's name: tokenizer and processor come from there, offline. (Given
    a name without a loadable processor, TransformerLens would try to install torchvision with pip.)
    """
    device = model.device
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    # A model that was built and not loaded doesn't say what it is.
    model.config.architectures = model.config.architectures or [type(model).__name__]
    return TransformerBridge.boot_transformers(str(small_model_path("llava")), hf_model=model, device=device)


@contextmanager
def without_torchvision_check(model: Any) -> Iterator[str]:
    """Some adapters refuse to load without torchvision, which only their processors use; yields what they ask for."""
    adapter = SUPPORTED_ARCHITECTURES.get(type(model).__name__)
    wanted = adapter.required_libraries if adapter else []
    with mock.patch.object(adapter, "required_libraries", []) if wanted else mock.MagicMock():
        yield ", ".join(wanted)


@dataclass
class Subject:
    """A model in TransformerLens, the same model in transformers with eager attention, and one padded batch."""

    model: Any
    inputs: dict[str, Tensor]
    rest: dict[str, Tensor] = field(init=False)
    plain: Any = field(init=False)
    bridge: Any = field(init=False)
    reference: Tensor = field(init=False)
    logits: Tensor = field(init=False)
    cache: Any = field(init=False)

    def __post_init__(self) -> None:
        self.rest = {name: value for name, value in self.inputs.items() if name != "input_ids"}
        self.plain = copy.deepcopy(self.model)
        self.plain.set_attn_implementation("eager")
        self.bridge = bridge(self.model)
        self.reference = self.plain(**self.inputs).logits
        self.logits, self.cache = self.bridge.run_with_cache(self.ids, **self.rest)

    @property
    def ids(self) -> Int[Tensor, "b p"]:
        """Token ids."""
        return self.inputs["input_ids"]

    @property
    def real(self) -> Bool[Tensor, "b p"]:
        """Positions of the logits that are not padding."""
        if "decoder_input_ids" in self.inputs:
            return torch.ones_like(self.inputs["decoder_input_ids"], dtype=torch.bool)
        return self.inputs["attention_mask"].bool()

    def moved(self, logits: Tensor, other: Tensor | None = None) -> float:
        """Largest difference of logits at real positions."""
        return float((logits - (self.logits if other is None else other))[self.real].abs().max())

    def write(self, name: str, function: Callable[[Tensor], Tensor] = torch.zeros_like) -> float:
        """How far the logits move when a hook's value is replaced."""
        hooks = [(name, lambda value, hook: function(value))]
        return self.moved(self.bridge.run_with_hooks(self.ids, fwd_hooks=hooks, **self.rest))

    def silent(self) -> list[str]:
        """Listed hooks that did not fire."""
        return [name for name in self.bridge.hook_dict if name not in self.cache]
