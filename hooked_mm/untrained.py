"""The same model with random weights: what architecture, picture and prompt give away by themselves."""

from __future__ import annotations

import torch
from transformers import AutoModelForImageTextToText

from hooked_mm.hooked import HookedMM


def untrained_copy(model: HookedMM, seed: int = 0) -> HookedMM:
    """The same architecture and processor with random weights; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = AutoModelForImageTextToText.from_config(model.hf_model.config, dtype=model.dtype)
    # Its names mean what they mean in the trained model, which has been checked.
    return HookedMM(fresh.eval().requires_grad_(False).to(model.device), model.processor, check=False)
