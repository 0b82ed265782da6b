"""TransformerLens's bridge around a transformers model, for comparison; importing this needs TransformerLens 4."""

from __future__ import annotations

import copy
import os
from typing import Any

# Before it is imported: TransformerLens asks the hub about the names it is given.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
    return TransformerBridge.boot_transformers(str(small_model_path("llava")), hf_model=model, device=device)
