"""The models and batches that benchmarks run: raw forward tensors, no processor, the same for the same seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hooked_mm.small import small_model_path

LlavaInputs = dict[str, Float[Tensor, "..."] | Int[Tensor, "..."]]


@dataclass(frozen=True)
class Size:
    """A model of a size with a name. `text_positions`: of the longest sample, beside its image tokens."""

    name: str
    model: LlavaForConditionalGeneration
    text_positions: int

    def batch(self, samples: int, seed: int = 0) -> LlavaInputs:
        """`llava_batch` of this model on its device."""
        made = llava_batch(self.model.config, samples, self.text_positions, seed)
        return {name: value.to(self.model.device) for name, value in made.items()}


def small_llava() -> Size:
    """The shipped small LLaVA (128 x 6 layers, 36 image tokens), float32; batches of 47 positions."""
    model = AutoModelForImageTextToText.from_pretrained(small_model_path("llava"), dtype=torch.float32)
    return Size("small", model.requires_grad_(False).eval(), 11)


def _random_llava(vision: dict[str, int], text: dict[str, int], seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA of these sizes with patches of 14 pixels, float32, from transformers' own initialisation under `seed`.

    The caller's random state stays.
    """
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(patch_size=14, **vision),
        text_config=LlamaConfig(tie_word_embeddings=False, **text),
        image_token_id=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(vision["image_size"] // 14) ** 2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).requires_grad_(False).eval()


def mid_llava(seed: int = 0) -> Size:
    """The mid-size LLaVA: text 512 x 8 layers, tower 256 x 6 layers of 224 px (256 image tokens); 300 positions."""
    vision = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 224,
        "projection_dim": 256,
    }
    text = {
        "vocab_size": 8000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 512,
    }
    return Size("mid", _random_llava(vision, text, seed), 44)


def long_llava(seed: int = 0) -> Size:
    """2,900 positions: 2,704 image tokens (728 px, patches of 14), 196 of text; 256 x 16 layers, 8 heads; random."""
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 728,
        "projection_dim": 64,
    }
    text = {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    }
    return Size("long", _random_llava(vision, text, seed), 196)


def llava_batch(config: LlavaConfig, samples: int, text_positions: int, seed: int = 0) -> LlavaInputs:
    """Forward tensors of `samples` prompts with one random picture each, padded on the left.

    Args:
        config: Of the model the batch is for.
        samples: Number of prompts.
        text_positions: Text tokens of the longest prompt; every next prompt has two fewer, down to four shorter rows,
            and then from the start again.
        seed: Of words and pictures.

    Returns:
        `input_ids` and `attention_mask` (samples, image_seq_length + text_positions), `pixel_values`
        (samples, 3, height, width). The picture is behind the first word.
    """
    made = torch.Generator().manual_seed(seed)
    side, image, vocab = config.vision_config.image_size, config.image_token_id, config.get_text_config().vocab_size
    length = config.image_seq_length + text_positions
    # Ids above the image token's are ordinary words in both models.
    ids = torch.randint(image + 1, vocab, (samples, length), generator=made)
    mask = torch.ones(samples, length, dtype=torch.long)
    for row in range(samples):
        padding = 2 * (row % 5)
        ids[row, :padding], mask[row, :padding] = 0, 0
        ids[row, padding + 1 : padding + 1 + config.image_seq_length] = image
    pixels = torch.randn(samples, 3, side, side, generator=made)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
