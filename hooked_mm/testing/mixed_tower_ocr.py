"""Miniatures of readers of documents: tower upon tower, towers that merge patches half-way, linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from hooked_mm.testing.mixed_tower import SAM
from hooked_mm.testing.packed_tower import modality_ids
from hooked_mm.testing.recipe import IMAGE_TOKEN, LLAMA, VIT, Inputs, Recipe

_EXPERTS = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    "n_group": 1,
    "topk_group": 1,
}
# Delta-net layers between layers of attention, three rotary positions.
_QWEN3_5 = {
    "model_type": "qwen3_5_text",
    **LLAMA,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
_MINICPM = {
    "text_config": _QWEN3_5,
    "vision_config": {**VIT, "num_hidden_layers": 4, "image_size": 64},
    "insert_layer_id": 1,
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 151,
}


def large_pictures(config: Any, images: int, generator: Generator) -> Inputs:
    """`pixel_values` (images, 3, 64, 64)."""
    return {"pixel_values": torch.randn(images, 3, 64, 64, generator=generator)}


def packed_row(config: Any, images: int, generator: Generator) -> Inputs:
    """Pictures of three shapes, their patches side by side in one row of pixels (MiniCPM-V)."""
    shapes = [[(4, 8), (8, 4), (4, 4)][index % 3] for index in range(images)]
    patches = sum(rows * cols for rows, cols in shapes)
    pixels = torch.randn(1, 3, 8, 8 * patches, generator=generator)
    return {"pixel_values": pixels, "target_sizes": torch.tensor(shapes)}


def framed(count: int) -> list[int]:
    """Image tokens between an image's start and end."""
    return [152, *[IMAGE_TOKEN] * count, 153]


RECIPES: dict[str, Recipe] = {
    "deepseek_ocr2": Recipe(
        {
            "text_config": {**LLAMA, **_EXPERTS},
            "vision_config": {
                "sam_config": {**SAM, "downsample_channels": [24, 32]},
                "encoder_config": {
                    **{name: VIT[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")},
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                },
            },
            "image_token_id": IMAGE_TOKEN,
        },
        pictures=large_pictures,
    ),
    "unlimited_ocr": Recipe(
        {
            "text_config": {**LLAMA, **_EXPERTS, "sliding_window": 8},
            "vision_config": {
                "sam_config": {**SAM, "downsample_channels": [24, 32]},
                "encoder_config": {**VIT, "image_size": 16},
            },
            "image_token_id": IMAGE_TOKEN,
        },
        pictures=large_pictures,
    ),
    "minicpm_ocr": Recipe(_MINICPM, pictures=packed_row),
    "minicpmv4_6": Recipe(_MINICPM, pictures=packed_row),
    "minicpmv4_7": Recipe(
        {
            **_MINICPM,
            "image_start_id": 152,
            "image_end_id": 153,
            "slice_start_id": 154,
            "slice_end_id": 155,
            "newline_id": 156,
        },
        pictures=packed_row,
        ids=framed,
        extra=modality_ids,
    ),
    "qianfan_ocr": Recipe(
        {
            "text_config": {"model_type": "qwen3", **LLAMA, "head_dim": 16},
            "vision_config": {**VIT, "use_qk_norm": True},
            "image_token_id": IMAGE_TOKEN,
        }
    ),
}
