"""More miniatures whose tower takes the patches of all images as one sequence, with a dense language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from hooked_mm.testing.packed_tower import (
    DEEPSTACK,
    ONE_FRAME,
    QWEN_MARKS,
    QWEN_TEXT,
    QWEN_TOWER,
    WINDOWS,
    grids,
    modality_ids,
    patches,
)
from hooked_mm.testing.recipe import IMAGE_TOKEN, LLAMA, VIT, Inputs, Recipe

MARKS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 151,
    "image_start_token_id": 152,
    "image_end_token_id": 153,
    "video_start_token_id": 154,
    "video_end_token_id": 155,
}
PARTIAL_MROPE = {
    "rope_theta": 10000.0,
    "rope_type": "default",
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
}
GLM_TOWER = {**QWEN_TOWER, "image_size": 32}
_GLM = {"text_config": {**LLAMA, "rope_parameters": PARTIAL_MROPE}, "vision_config": GLM_TOWER, **MARKS}
LINEAR_ATTENTION = {
    # The first tokens' states are near zero, and the norm behind them would make their rounding large.
    "rms_norm_eps": 1e-3,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {**PARTIAL_MROPE, "mrope_interleaved": True},
}
AUDIO = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "n_window": 8,
    "output_dim": 64,
}


def marked_run(count: int) -> list[int]:
    """Image tokens between their start and end marks."""
    return [152, *[IMAGE_TOKEN] * count, 153]


def merged_patches(config: Any, images: int, generator: Generator) -> Inputs:
    """Each image says by how much it is shrunk behind the tower (VideoLLaMA 3)."""
    return {
        **ONE_FRAME(config, images, generator),
        "image_merge_sizes": torch.tensor([[2, 1, 2][index % 3] for index in range(images)]),
    }


RECIPES: dict[str, Recipe] = {
    "cosmos3_edge": Recipe(
        {
            "text_config": {**QWEN_TEXT, "head_dim": 16},
            "vision_config": {**VIT, "num_patches": 16},
            "projector_hidden_size": 48,
            **QWEN_MARKS,
        },
        pictures=ONE_FRAME,
        extra=modality_ids,
    ),
    "cosmos3_omni": Recipe(
        {
            "text_config": {**QWEN_TEXT, "head_dim": 16},
            "vision_config": {**QWEN_TOWER, **DEEPSTACK},
            **QWEN_MARKS,
        },
        pictures=grids,
        extra=modality_ids,
    ),
    "exaone4_5": Recipe(
        {
            "text_config": {
                "model_type": "exaone4",
                **LLAMA,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "vision_config": {**QWEN_TOWER, **WINDOWS, "num_key_value_heads": 2},
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 151,
        },
        pictures=grids,
    ),
    "glm4v": Recipe(_GLM, pictures=grids, extra=modality_ids),
    "glm46v": Recipe(_GLM, pictures=grids, extra=modality_ids),
    "glmga": Recipe(_GLM, pictures=grids, extra=modality_ids),
    "glm_ocr": Recipe(_GLM, pictures=grids, extra=modality_ids),
    "hunyuan_vl": Recipe(
        {
            "text_config": {
                **LLAMA,
                "head_dim": 16,
                "rope_parameters": {**PARTIAL_MROPE, "mrope_section": [2, 2, 2, 2]},
            },
            "vision_config": {**VIT, "max_image_size": 64, "min_image_size": 16},
            "image_token_id": IMAGE_TOKEN,
            "im_start_id": 152,
            "im_end_id": 153,
            "im_newline_id": 154,
        },
        pictures=ONE_FRAME,
        extra=modality_ids,
    ),
    "paddleocr_vl": Recipe(
        {"text_config": {**QWEN_TEXT, "head_dim": 16}, "vision_config": VIT, **QWEN_MARKS},
        pictures=patches(3, 8, 8),
        extra=modality_ids,
    ),
    "qwen2_5_omni_thinker": Recipe(
        {
            "text_config": QWEN_TEXT,
            "vision_config": {**QWEN_TOWER, **WINDOWS},
            "audio_config": AUDIO,
            "image_token_index": IMAGE_TOKEN,
            "video_token_index": 151,
            "audio_token_index": 156,
            "vision_start_token_id": 152,
            "vision_end_token_id": 153,
            "audio_start_token_id": 154,
            "audio_end_token_id": 155,
        },
        pictures=grids,
        ids=marked_run,
    ),
    "qwen3_5": Recipe(
        {
            "text_config": {**LLAMA, **LINEAR_ATTENTION},
            "vision_config": {**QWEN_TOWER, "num_position_embeddings": 64},
            **QWEN_MARKS,
        },
        pictures=grids,
        extra=modality_ids,
    ),
    "video_llama_3": Recipe(
        {
            "text_config": {"model_type": "qwen2", **LLAMA},
            "vision_config": VIT,
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 151,
        },
        pictures=merged_patches,
    ),
}
