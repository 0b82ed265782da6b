"""Miniatures of one tower, one projector, one decoder: image features stand in the text's sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from hooked_mm.testing.recipe import IMAGE_TOKEN, LLAMA, VIT, VOCABULARY, Inputs, Recipe

PINPOINTS = [[32, 64], [64, 32], [64, 64]]
SIGLIP = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA = {
    "text_config": {
        **LLAMA,
        **SLIDING,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 30.0,
    },
    "vision_config": SIGLIP,
    "mm_tokens_per_image": 4,
    "image_token_index": IMAGE_TOKEN,
    "boi_token_index": 152,
    "eoi_token_index": 153,
}


def tiled(config: Any, images: int, generator: Generator) -> Inputs:
    """A wide, a tall and a square picture: base crop and two or four crops of it, padded to the longest."""
    sizes = [[(32, 64), (64, 32), (64, 60)][index % 3] for index in range(images)]
    values = torch.randn(images, 5, 3, 32, 32, generator=generator)
    for index, size in enumerate(sizes):
        values[index, 3 if 32 in size else 5 :] = 0
    found = {"pixel_values": values, "image_sizes": torch.tensor(sizes)}
    if config.model_type == "llava_onevision":
        found["batch_num_images"] = torch.ones(images, dtype=torch.long)
    return found


def one_crop(config: Any, images: int, generator: Generator) -> Inputs:
    """One crop per sample, with its mask."""
    return {
        "pixel_values": torch.randn(images, 1, 3, 32, 32, generator=generator),
        "pixel_attention_mask": torch.ones(images, 1, 32, 32, dtype=torch.long),
    }


def latents(model: Any, pictures: Inputs) -> list[int]:
    """As many positions as the perceiver has latents, whatever the picture."""
    return [model.config.perceiver_config.resampler_n_latents] * len(pictures["pixel_values"])


def token_types(config: Any, inputs: Inputs) -> Inputs:
    """1 at image tokens: they attend to each other both ways."""
    return {"token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}


RECIPES: dict[str, Recipe] = {
    "llava": Recipe(
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": {"model_type": "clip_vision_model", **VIT},
            "image_token_index": IMAGE_TOKEN,
        }
    ),
    "llava_next": Recipe(
        {
            "text_config": {"model_type": "mistral", **LLAMA},
            "vision_config": {"model_type": "clip_vision_model", **VIT},
            "image_token_index": IMAGE_TOKEN,
            "image_grid_pinpoints": PINPOINTS,
        },
        pictures=tiled,
    ),
    "llava_onevision": Recipe(
        {
            "text_config": {"model_type": "qwen2", **LLAMA},
            "vision_config": SIGLIP,
            "image_token_index": IMAGE_TOKEN,
            "image_grid_pinpoints": PINPOINTS,
        },
        pictures=tiled,
    ),
    "idefics2": Recipe(
        {
            "text_config": {"model_type": "mistral", **LLAMA},
            "vision_config": VIT,
            "perceiver_config": {
                "hidden_size": 64,
                "resampler_n_latents": 5,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            "image_token_id": IMAGE_TOKEN,
        },
        pictures=one_crop,
        counts=latents,
    ),
    "idefics3": Recipe(
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": VIT,
            "scale_factor": 2,
            "image_token_id": IMAGE_TOKEN,
        },
        pictures=one_crop,
    ),
    "smolvlm": Recipe(
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": VIT,
            "scale_factor": 2,
            "image_token_id": IMAGE_TOKEN,
        },
        pictures=one_crop,
    ),
    "gemma3": Recipe(_GEMMA, extra=token_types),
    "shieldgemma2": Recipe(_GEMMA, extra=token_types),
    "paligemma": Recipe(
        {
            "text_config": {"model_type": "gemma", **LLAMA, "head_dim": 16},
            "vision_config": SIGLIP,
            "image_token_index": IMAGE_TOKEN,
            "projection_dim": 64,
            "hidden_size": 64,
            "vocab_size": VOCABULARY,
        },
        extra=token_types,
    ),
    "aya_vision": Recipe(
        {
            "text_config": {"model_type": "cohere2", **LLAMA, **SLIDING, "logit_scale": 0.25},
            "vision_config": SIGLIP,
            "image_token_index": IMAGE_TOKEN,
        }
    ),
    "cohere2_vision": Recipe(
        {
            "text_config": {"model_type": "cohere2", **LLAMA, **SLIDING, "logit_scale": 0.25},
            # Its tower pools, though nothing reads that.
            "vision_config": {**SIGLIP, "vision_use_head": True},
            "image_token_id": IMAGE_TOKEN,
            "alignment_intermediate_size": 96,
        }
    ),
    "llava_next_video": Recipe(
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": {"model_type": "clip_vision_model", **VIT},
            "image_token_index": IMAGE_TOKEN,
            "video_token_index": 151,
            "image_grid_pinpoints": PINPOINTS,
        },
        pictures=tiled,
    ),
    "vipllava": Recipe(
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": {"model_type": "clip_vision_model", **VIT},
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_layer": [-2, -1, 1],
        }
    ),
    "internvl": Recipe(
        {
            "text_config": {"model_type": "qwen2", **LLAMA},
            "vision_config": {**VIT, "image_size": [32, 32], "patch_size": [8, 8], "use_qk_norm": True},
            "image_token_id": IMAGE_TOKEN,
        }
    ),
}
