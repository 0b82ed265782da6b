"""Weights of 4 bits (bitsandbytes, on the CPU too; skips itself without it): names, sizes, dtypes and every check."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hooked_mm.hooked import HookedMM

# Widths that bitsandbytes can pack on a CPU: multiples of 64.
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.mark.slow
def test_four_bits_have_the_names_and_sizes_of_the_plain_model(tmp_path: Path) -> None:
    """Packed weights are (n, 1) whole numbers: parts, sizes, dtypes are found all the same, and all checks hold."""
    pytest.importorskip("bitsandbytes")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_SIZES, image_size=24, patch_size=8, projection_dim=32),
        text_config=LlamaConfig(**_SIZES, vocab_size=160, max_position_embeddings=512),
        image_token_id=150,
        vision_feature_layer=-1,
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    plain = LlavaForConditionalGeneration(config).requires_grad_(False).eval()
    plain.save_pretrained(tmp_path)
    packed = AutoModelForImageTextToText.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
        device_map={"": "cpu"},
    )
    assert sum(weight.dtype == torch.uint8 for weight in packed.parameters()) > 20
    model = HookedMM(packed.requires_grad_(False))
    ids = torch.tensor([[1, *[150] * 9, 5, 6, 7], [1, *[150] * 9, 8, 9, 10]])
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    logits, cache = model.run_with_cache(inputs, "*")
    assert model.conformance is not None
    assert model.conformance.ok
    known = HookedMM(plain, check=False)
    assert (model.structure, model.cfg, model.hook_names) == (known.structure, known.cfg, known.hook_names)
    assert model.dtype == cache["blocks.1.attn.hook_q"].dtype == torch.bfloat16
    assert torch.equal(model.to_logits(cache["blocks.2.hook_resid_post"]), logits)
