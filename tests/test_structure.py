"""Finding the parts of a model, and refusing what is not recognised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hooked_mm.errors import UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.resolve import resolve

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
    with pytest.raises(UnsupportedModelError, match=r"Linear .* is not a vision-language.*hooked-mm models"):
        resolve(nn.Linear(2, 2))


class Rebuilt(LlamaDecoderLayer):
    """A block of strange names: `first` for attention, `second` for the MLP, each with weights of its own."""

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        hidden_states = hidden_states + self.first(self.strange_norm(hidden_states), **options)[0]
        return self.joined(hidden_states, self.second(self.other_norm(hidden_states)))

    def joined(self, stream: Tensor, added: Tensor) -> Tensor:
        """How the MLP's output and the stream make the next one."""
        return stream + added


class Gated(Rebuilt):
    """The stream is multiplied by what the MLP gives: nothing is added."""

    def joined(self, stream: Tensor, added: Tensor) -> Tensor:
        return stream * added.sigmoid()


def rebuilt(kind: type[Rebuilt]) -> LlavaForConditionalGeneration:
    """A LLaVA whose decoder blocks go by other names."""
    hf_model = miniature(LlamaConfig, CLIPVisionConfig)
    names = {"input_layernorm": "strange_norm", "post_attention_layernorm": "other_norm"}
    names |= {"self_attn": "first", "mlp": "second"}
    for block in hf_model.model.language_model.layers:
        for old, new in names.items():
            block.add_module(new, getattr(block, old))
            delattr(block, old)
        block.__class__ = kind
    return hf_model


def test_a_block_of_strange_names_is_found_by_what_flows_through_it() -> None:
    """Norms, attention and MLP of a block that no name is known of, down to the projections."""
    block = HookedMM(rebuilt(Rebuilt), check=False).structure.text.blocks[0]
    assert block.wiring == "pre"
    found = {"ln1": "strange_norm", "ln2": "other_norm", "attn": "first", "mlp": "second"}
    inner = {"q": "first.q_proj", "k": "first.k_proj", "v": "first.v_proj", "o": "first.o_proj"}
    inner |= {"mlp_gate": "second.gate_proj", "mlp_up": "second.up_proj", "mlp_down": "second.down_proj"}
    assert dict(block.parts) == {"block": "", **found, **inner}


def test_a_block_that_is_no_sum_of_its_parts_is_refused() -> None:
    """Neither names nor flow explain it: what it has is listed, with where to add names."""
    with pytest.raises(
        UnsupportedModelError, match=r"no recognised ln1, attn, ln2, mlp; it has .*strange_norm.*PART_N"
    ):
        HookedMM(rebuilt(Gated))


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
