"""Finding the parts of a model, and refusing what is not recognised."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from hooked_mm.errors import UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.structure import resolve

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def miniature(text: type, vision: type, **options: int) -> LlavaForConditionalGeneration:
    """A random LLaVA with another decoder and tower."""
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=text(**SIZES, vocab_size=50, num_key_value_heads=2, **options),
        vision_config=vision(**TOWER, image_size=32, patch_size=8),
        image_token_id=7,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if vision is CLIPVisionConfig else "full",
    )
    return LlavaForConditionalGeneration(config).eval()


def test_the_small_llava(llava: HookedMM) -> None:
    """Sizes and places, as its config says."""
    cfg = llava.cfg
    assert (cfg.family, cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp) == ("llava", 6, 128, 4, 32, 256)
    assert cfg.vision is not None
    assert (cfg.vision.n_layers, cfg.vision.d_model, cfg.vision.d_head) == (4, 96, 24)
    assert cfg.d_vocab == 72
    assert llava.structure.projector == "model.multi_modal_projector"


@pytest.mark.parametrize("text", [LlamaConfig, MistralConfig, Qwen2Config])
@pytest.mark.parametrize("vision", [CLIPVisionConfig, SiglipVisionConfig])
def test_llavas_with_other_decoders_and_towers(text: type, vision: type) -> None:
    """By structure, not by name: grouped heads, other towers, the tower's layer before last; points still mean it."""
    hf_model = miniature(text, vision)
    hooked = HookedMM(hf_model)
    assert hooked.cfg.n_kv_heads == 2
    ids = torch.tensor([[1, *[7] * 16, 3, 4]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    logits, cache = hooked.run_with_cache(inputs)
    with torch.no_grad():
        assert torch.equal(logits, hf_model(**inputs).logits)
    assert set(cache) == {name for name, point in hooked.hook_points.items() if not point.costly}
    assert cache["blocks.1.attn.hook_k"].shape == (1, 19, 2, 8)
    assert torch.equal(
        cache["blocks.1.hook_resid_mid"] + cache["blocks.1.hook_mlp_out"], cache["blocks.1.hook_resid_post"]
    )
    assert torch.equal(cache["hook_embed"][0, 1:17], cache["projector.hook_out"][0])
    assert torch.equal(cache["projector.hook_in"][0], cache["vision.blocks.0.hook_resid_post"][0, -16:])


def test_what_is_no_vision_language_model_is_refused() -> None:
    """The class is named, and the families that are proved."""
    with pytest.raises(UnsupportedModelError, match=r"Linear .* is not a vision-language.*Proved families: llava"):
        resolve(nn.Linear(2, 2))


def test_a_block_with_unknown_parts_is_refused() -> None:
    """A renamed norm is named as missing, with what the block has and where to add it."""
    hf_model = miniature(LlamaConfig, CLIPVisionConfig)
    block = hf_model.model.language_model.layers[0]
    block.add_module("strange_norm", block.post_attention_layernorm)
    del block.post_attention_layernorm
    with pytest.raises(UnsupportedModelError, match=r"no recognised ln2; it has .*strange_norm.*PART_NAMES"):
        HookedMM(hf_model)


def test_peft_wrapped_models_keep_their_names() -> None:
    """With LoRA around it the same names read the same places; the adapter's effect is in them."""
    peft = pytest.importorskip("peft")
    hf_model = miniature(LlamaConfig, CLIPVisionConfig)
    names = HookedMM(hf_model).hook_names
    wrapped = peft.get_peft_model(hf_model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    hooked = HookedMM(wrapped.eval())
    assert hooked.hook_names == names
    ids = torch.tensor([[1, 2, 3]])
    logits, cache = hooked.run_with_cache({"input_ids": ids})
    with torch.no_grad():
        assert torch.equal(logits, wrapped(input_ids=ids).logits)
    assert cache["blocks.0.attn.hook_q"].shape == (1, 3, 4, 8)
