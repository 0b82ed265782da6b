"""Miniature LLaVAs with other decoders, and caches that know their model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hooked_mm.cache import ActivationCache
from hooked_mm.hooked import HookedMM


def run(model: HookedMM, batch: Any, names: Any = None) -> tuple[Tensor, ActivationCache]:
    """Logits, and a cache that knows its model."""
    with torch.no_grad():
        logits, cache = model.run_with_cache(batch, names)
    return logits, ActivationCache(dict(cache), cache.batch, model.hook_points, model=model)


def miniature(config: type, **options: Any) -> HookedMM:
    """A LLaVA with another decoder, all of whose weights and biases are random."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    made = LlavaConfig(
        text_config=config(
            **sizes, vocab_size=50, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        image_token_id=7,
    )
    torch.manual_seed(0)
    hf_model = LlavaForConditionalGeneration(made).eval()
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return HookedMM(hf_model)


INPUTS = {
    "input_ids": torch.tensor([[1, *[7] * 16, 3, 4, 5], [0, 1, *[7] * 16, 9, 8]]),
    "attention_mask": torch.tensor([[1] * 20, [0] + [1] * 19]),
    "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
}


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Within a tolerance of the size of the values."""
    return bool((ours - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0))
