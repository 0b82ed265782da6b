"""Miniatures of several towers, of mixtures of experts and of state spaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from hooked_mm.testing.packed_tower import grids
from hooked_mm.testing.recipe import IMAGE_TOKEN, LLAMA, VIT, VOCABULARY, Inputs, Recipe

_SIGLIP = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
# Segment Anything's tower: windows of 3 x 3 patches, one block over the whole picture, relative positions.
SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "mlp_dim": 48,
    "image_size": 64,
    "patch_size": 8,
    "output_channels": 16,
    "window_size": 3,
    "global_attn_indexes": [1, 3],
}
_MARKS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 151}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}


def masked(config: Any, images: int, generator: Generator) -> Inputs:
    """A full picture and two that fill a part of the square, with the mask that says which (Aria)."""
    mask = torch.ones(images, 32, 32, dtype=torch.bool)
    mask[1::3, :, 24:], mask[2::3, 16:] = False, False
    values = torch.randn(images, 3, 32, 32, generator=generator) * mask[:, None]
    return {"pixel_values": values, "pixel_mask": mask}


def two_sizes(config: Any, images: int, generator: Generator) -> Inputs:
    """A picture in low and in high resolution, for two towers."""
    return {
        "pixel_values": torch.randn(images, 3, 32, 32, generator=generator),
        "high_res_pixel_values": torch.randn(images, 3, 64, 64, generator=generator),
    }


def patch_grids(config: Any, images: int, generator: Generator) -> Inputs:
    """Pictures of three shapes, cut into patches of 8 x 8 pixels, one behind the other (Nemotron)."""
    shapes = [[(4, 6), (6, 4), (4, 4)][index % 3] for index in range(images)]
    pixels = torch.randn(sum(rows * cols for rows, cols in shapes), 3 * 8 * 8, generator=generator)
    return {"pixel_values": pixels, "image_grid_hw": torch.tensor(shapes)}


def still_grids(config: Any, images: int, generator: Generator) -> Inputs:
    """As `grids`, in patches of one frame."""
    found = grids(config, images, generator)
    return {**found, "pixel_values": found["pixel_values"][:, ::2]}


def indicated(count: int) -> list[int]:
    """Image tokens between the marks of an image, which are visual words, too (Ovis)."""
    return [152, *[IMAGE_TOKEN] * count, 153]


RECIPES: dict[str, Recipe] = {
    "aria": Recipe(
        {
            "text_config": {
                **LLAMA,
                "intermediate_size": 32,
                "moe_num_experts": 4,
                "moe_topk": 2,
                "moe_num_shared_experts": 2,
            },
            "vision_config": {"model_type": "idefics3_vision", **VIT},
            "projector_patch_to_query_dict": {16: 5},
            "image_token_index": IMAGE_TOKEN,
        },
        pictures=masked,
    ),
    "deepseek_vl": Recipe(
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": _SIGLIP,
            "image_token_id": IMAGE_TOKEN,
        }
    ),
    "deepseek_vl_hybrid": Recipe(
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": _SIGLIP,
            "high_res_vision_config": {"model_type": "sam_vision_model", **SAM},
            "image_token_id": IMAGE_TOKEN,
        },
        pictures=two_sizes,
    ),
    "dots3_note": Recipe(
        {
            "text_config": {
                **LLAMA,
                **_EXPERTS,
                "num_hidden_layers": 5,
                "num_key_value_heads": 4,
                "n_routed_experts": 8,
                "n_group": 2,
                "topk_group": 1,
                "shared_experts_intermediate_size": 32,
                "mlp_layer_types": ["dense", "dense", "sparse", "sparse", "sparse"],
                "layer_types": ["indexed_attention", "sliding_attention"] * 2 + ["indexed_attention"],
                "q_lora_rank": 24,
                "kv_lora_rank": 16,
                "head_dim": 16,
                "qk_nope_head_dim": 12,
                "qk_rope_head_dim": 4,
                "v_head_dim": 16,
                "index_topk": 6,
                "index_head_dim": 8,
                "index_n_heads": 2,
                "sliding_window": 8,
                "swa_num_attention_heads": 2,
                "swa_num_key_value_heads": 2,
                "swa_q_lora_rank": 24,
                "swa_kv_lora_rank": 16,
                "swa_head_dim": 32,
                "swa_qk_nope_head_dim": 24,
                "swa_v_head_dim": 16,
            },
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "moe_intermediate_size": 24,
                "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "patch_size": 8,
                "adapter_in_dim": 32,
                "adapter_out_dim": 64,
            },
            "audio_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "downsample_hidden_size": 4,
                "feature_size": 16,
                "adapter_input_size": 32,
                "adapter_out_dim": 64,
            },
            **_MARKS,
            "audio_token_id": 154,
        },
        pictures=still_grids,
    ),
    "hyperclovax_vision_v2": Recipe(
        {
            "text_config": {
                "model_type": "hyperclovax",
                **LLAMA,
                "embedding_multiplier": 2.0,
                "logits_scaling": 0.5,
                "residual_multiplier": 0.7,
                "attention_multiplier": 0.3,
            },
            "vision_config": {
                "model_type": "qwen2_5_vl_vision",
                "hidden_size": 32,
                "out_hidden_size": 48,
                "depth": 3,
                "num_heads": 4,
                "patch_size": 8,
                "intermediate_size": 48,
                "window_size": 32,
                "fullatt_block_indexes": [1],
            },
            **_MARKS,
        },
        pictures=grids,
    ),
    "minimax_m3_vl": Recipe(
        {
            "text_config": {
                **LLAMA,
                "head_dim": 16,
                "rotary_dim": 8,
                "intermediate_size": 32,
                "dense_intermediate_size": 96,
                "shared_intermediate_size": 32,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
                "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
                "index_n_heads": 2,
                "index_head_dim": 8,
                "index_block_size": 4,
                "index_topk_blocks": 2,
            },
            "vision_config": {**VIT, "hidden_size": 48, "image_size": 64},
            "projector_hidden_size": 48,
            "image_token_index": IMAGE_TOKEN,
            "video_token_index": 151,
        },
        pictures=grids,
    ),
    "nemotron_h_omni": Recipe(
        {
            "text_config": {
                "model_type": "nemotron_h",
                **{name: value for name, value in LLAMA.items() if name != "num_hidden_layers"},
                **_EXPERTS,
                "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
                "head_dim": 16,
                "ssm_state_size": 8,
                "mamba_num_heads": 4,
                "mamba_head_dim": 32,
                "n_groups": 2,
                "chunk_size": 8,
                "moe_shared_expert_intermediate_size": 32,
            },
            "vision_config": {
                "model_type": "radio",
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "mlp_ratio": 1.5,
                "patch_size": 8,
                "image_size": 32,
                "max_img_size": 64,
                "num_registers": 2,
                "video_temporal_patch_size": 2,
            },
            "projector_hidden_size": 48,
            "vision_hidden_size": 32,
            **_MARKS,
        },
        pictures=patch_grids,
    ),
    "ovis2": Recipe(
        {
            "text_config": {"model_type": "qwen2", **LLAMA},
            "vision_config": {**VIT, "vocab_size": 40, "hidden_stride": 2, "qkv_bias": True},
            "image_token_id": IMAGE_TOKEN,
            "visual_indicator_token_ids": [152, 153, 154, 155, 156],
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
        },
        ids=indicated,
    ),
}
