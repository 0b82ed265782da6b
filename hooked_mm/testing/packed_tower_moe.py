"""Miniatures of packed towers with mixtures of experts, latent attention or several residual streams behind them."""

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
    grids,
    modality_ids,
    patches,
)
from hooked_mm.testing.packed_tower_more import (
    AUDIO,
    GLM_TOWER,
    LINEAR_ATTENTION,
    MARKS,
    PARTIAL_MROPE,
    marked_run,
)
from hooked_mm.testing.recipe import IMAGE_TOKEN, LLAMA, VIT, Inputs, Recipe

_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
_DENSE_AND_SPARSE = ["dense", "dense", "sparse", "sparse"]
_SPARSE_QWEN = {**QWEN_TEXT, **_EXPERTS, "head_dim": 16, "mlp_only_layers": [0, 2]}
_PLAIN_TOWER = {**QWEN_TOWER, "num_position_embeddings": 64}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 24}


def experts_by_modality(config: Any, inputs: Inputs) -> Inputs:
    """Start and end marks go to the image's experts, too (ERNIE)."""
    ids = inputs["input_ids"]
    return {**modality_ids(config, inputs), "moe_mm_token_type_ids": ((ids >= IMAGE_TOKEN) & (ids <= 153)).long()}


def large_picture(config: Any, images: int, generator: Generator) -> Inputs:
    """Two convolutions make one token of 4 x 4 patches (Step)."""
    return {"pixel_values": torch.randn(images, 3, 64, 64, generator=generator)}


RECIPES: dict[str, Recipe] = {
    "ernie4_5_vl_moe": Recipe(
        {
            "text_config": {
                **QWEN_TEXT,
                "moe_intermediate_size": [16, 12],
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_num_shared_experts": 1,
                "mlp_layer_types": _DENSE_AND_SPARSE,
            },
            "vision_config": QWEN_TOWER,
            **MARKS,
        },
        pictures=ONE_FRAME,
        ids=marked_run,
        extra=experts_by_modality,
    ),
    "glm4v_moe": Recipe(
        {
            "text_config": {**LLAMA, **_ROUTED, "first_k_dense_replace": 2, "rope_parameters": PARTIAL_MROPE},
            "vision_config": GLM_TOWER,
            **MARKS,
        },
        pictures=grids,
        extra=modality_ids,
    ),
    "glm5_next": Recipe(
        {
            "text_config": {
                **LLAMA,
                **_LATENT,
                **_ROUTED,
                "mlp_layer_types": _DENSE_AND_SPARSE,
                "layer_types": ["linear_attention", "indexed_attention"] * 2,
                "index_topk": 8,
                "index_kpool": 4,
                "index_head_dim": 16,
                "index_n_heads": 2,
                "linear_head_dim": 8,
                "linear_num_heads": 4,
                "hc_mult": 3,
                "hc_sinkhorn_iters": 4,
                "swiglu_limit": 1.0,
            },
            "vision_config": {**GLM_TOWER, "projection_intermediate_size": 48, "swiglu_limit": 1.0},
            **MARKS,
        },
        pictures=grids,
        extra=modality_ids,
    ),
    "kimi_k25": Recipe(
        {
            "text_config": {
                "model_type": "deepseek_v3",
                **LLAMA,
                **_LATENT,
                **_ROUTED,
                "qk_rope_head_dim": 8,
                "first_k_dense_replace": 2,
            },
            "vision_config": {**VIT, "pos_emb_height": 8, "pos_emb_width": 8},
            "projection_hidden_size": 32,
            **QWEN_MARKS,
        },
        pictures=patches(3, 8, 8),
    ),
    "qwen3_5_moe": Recipe(
        {"text_config": {**LLAMA, **LINEAR_ATTENTION, **_SHARED}, "vision_config": _PLAIN_TOWER, **QWEN_MARKS},
        pictures=grids,
        extra=modality_ids,
    ),
    "qwen3_vl_moe": Recipe(
        {"text_config": _SPARSE_QWEN, "vision_config": {**QWEN_TOWER, **DEEPSTACK}, **QWEN_MARKS},
        pictures=grids,
        extra=modality_ids,
    ),
    "qwen3_omni_moe_thinker": Recipe(
        {
            "text_config": _SPARSE_QWEN,
            "vision_config": {**QWEN_TOWER, **DEEPSTACK},
            "audio_config": {**AUDIO, "n_window_infer": 16, "conv_chunksize": 16, "downsample_hidden_size": 8},
            **QWEN_MARKS,
            "audio_token_id": 156,
            "audio_start_token_id": 154,
            "audio_end_token_id": 155,
        },
        pictures=grids,
        ids=marked_run,
    ),
    "qwen4_exp": Recipe(
        {
            "text_config": {
                **LLAMA,
                **LINEAR_ATTENTION,
                **_SHARED,
                "layer_types": ["linear_attention", "indexed_attention"] * 2,
                "hc_count": 3,
                "hc_lowrank": 8,
                "ple_layer_ids": [1, 3],
                "ple_embed_dim": 32,
                "ngram_vocab_size_base": 50,
                "heads_per_ngram": 2,
                "make_ngram_vocab_size_divisible_by": 4,
                "split_ngram_parts": 2,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
                "indexer_budget": 8,
                "indexer_compress_ratio": 4,
            },
            "vision_config": _PLAIN_TOWER,
            **QWEN_MARKS,
        },
        pictures=grids,
        extra=modality_ids,
    ),
    "step3p7": Recipe(
        {
            "text_config": {
                **LLAMA,
                "head_dim": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "mlp_layer_types": _DENSE_AND_SPARSE,
                "num_sliding_attention_heads": 6,
                "sliding_window": 8,
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "share_expert_dim": 24,
                "moe_router_scaling_factor": 2.0,
                "swiglu_limits": [0.0, 0.0, 0.0, 1.0],
                "swiglu_limits_shared": [0.0, 1.0, 0.0, 1.0],
            },
            "vision_config": {**VIT, "mlp_ratio": 1.5},
            "image_token_id": IMAGE_TOKEN,
        },
        pictures=large_picture,
    ),
}
