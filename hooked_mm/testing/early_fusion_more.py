"""Miniatures of the same makers' models with a tower: patches that say where they stand, wide or gated streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from hooked_mm.testing.early_fusion import (
    GEMMA4_MARKS,
    GEMMA4_TEXT,
    SEPARATOR,
    SHARED_KEYS,
    modalities,
    positioned_patches,
    with_scaled_stream,
)
from hooked_mm.testing.packed_tower import grids
from hooked_mm.testing.recipe import IMAGE_TOKEN, LLAMA, VIT, VOCABULARY, Inputs, Recipe

_GEMMA4_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 8,
    "use_clipped_linears": True,
    "standardize": True,
}
_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
_MUSE_TEXT = {
    **LLAMA,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "layer_rope_theta": [10000.0, 0, 10000.0, 0],
}
_MUSE = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "patch_size": 8,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
        "layer_types": ["window_attention", "full_attention"] * 2,
    },
    "out_hidden_size": 128,
    "projector_hidden_size": 48,
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 151,
}
_CANVAS = 5
_TILES = (1, 2, 1)


def quarter_counted(model: Any, pictures: Inputs) -> list[int]:
    """One position per 2 x 2 real patches."""
    return ((pictures["image_position_ids"] >= 0).all(dim=-1).sum(dim=1) // 4).tolist()


def canvas(config: Any, inputs: Inputs) -> Inputs:
    """Five tokens of noise to be refined, and which positions are one image."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 140, (len(inputs["input_ids"]), _CANVAS), generator=generator)
    seen = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
    return {**modalities(config, inputs), "decoder_input_ids": ids, "decoder_attention_mask": seen}


def merged_patches(config: Any, images: int, generator: Generator) -> Inputs:
    """Pictures of three shapes as one sequence of squares of 8 x 8 pixels, each four patches of the tower."""
    shapes = [[(1, 2, 3), (1, 3, 2), (1, 2, 2)][index % 3] for index in range(images)]
    squares = sum(t * rows * columns for t, rows, columns in shapes)
    return {
        "pixel_values": torch.randn(squares, 8, 8, 3, generator=generator),
        "image_grid_thw": torch.tensor(shapes),
    }


def overview_and_tiles(config: Any, images: int, generator: Generator) -> Inputs:
    """An overview, and one or two tiles side by side, of 4 x 4 patches each, pooled by 2 x 2 with a gap at the end."""
    pooling, grids, start = [], [], 0
    for index in range(images):
        tiles = _TILES[index % 3]
        overview = torch.arange(16).view(4, 4)
        wide = 16 + torch.arange(16 * tiles).view(tiles, 4, 4).transpose(0, 1).reshape(4, 4 * tiles)
        for picture in (overview, wide):
            windows = picture.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4) + start
            windows[-1, -1] = -1
            pooling.append(windows)
        grids.append((2, 2, 2, 2 * tiles))
        start += 16 * (1 + tiles)
    return {
        "pixel_values": torch.randn(start // 16, 16, 3 * 8 * 8, generator=generator),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor(grids),
        "image_num_crops": torch.tensor([1 + _TILES[index % 3] for index in range(images)]),
    }


def pooled_counted(model: Any, pictures: Inputs) -> list[int]:
    """One position per window of the overview and of the tiles."""
    sides = pictures["image_grids"]
    return (sides[:, 0] * sides[:, 1] + sides[:, 2] * sides[:, 3]).tolist()


def marked_overview(count: int) -> list[int]:
    """The overview's four tokens between marks, then the tiles' in two rows with a mark behind each."""
    columns = (count - 4) // 2
    return [152, *[IMAGE_TOKEN] * 4, 153, *([*[IMAGE_TOKEN] * columns, SEPARATOR] * 2)]


def last_state_counted(model: Any, pictures: Inputs) -> list[int]:
    """How many positions each image takes, where image features are the tower's last state."""
    with torch.no_grad():
        features = model.get_image_features(**pictures, return_dict=True).last_hidden_state
    return [len(part) for part in features]


RECIPES: dict[str, Recipe] = {
    "gemma4": Recipe(
        {
            "text_config": {
                **GEMMA4_TEXT,
                **SHARED_KEYS,
                **_EXPERTS,
                "enable_moe_block": True,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 16,
            },
            "vision_config": _GEMMA4_VISION,
            **GEMMA4_MARKS,
        },
        pictures=positioned_patches,
        extra=modalities,
        build=with_scaled_stream,
    ),
    "diffusion_gemma": Recipe(
        {
            "text_config": {
                **GEMMA4_TEXT,
                **_EXPERTS,
                "num_hidden_layers": 4,
                "layer_types": GEMMA4_TEXT["layer_types"][:4],
            },
            "vision_config": {"model_type": "gemma4_vision", **_GEMMA4_VISION},
            "image_token_id": IMAGE_TOKEN,
            "boi_token_id": 152,
            "eoi_token_id": 153,
            "canvas_length": _CANVAS,
        },
        pictures=positioned_patches,
        counts=quarter_counted,
        extra=canvas,
        build=with_scaled_stream,
    ),
    "muse_glimmer": Recipe({"text_config": _MUSE_TEXT, **_MUSE}, pictures=grids, extra=modalities),
    "muse_spark": Recipe(
        {
            "text_config": {
                **_MUSE_TEXT,
                "moe_hidden_size": 32,
                "moe_intermediate_size": 32,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            },
            "audio_config": {
                "patch_sizes": [4, 4],
                "hidden_sizes": [8, 8],
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "out_hidden_size": 64,
            },
            "audio_token_id": 154,
            **_MUSE,
        },
        pictures=grids,
        extra=modalities,
    ),
    "inkling2": Recipe(
        {
            "text_config": {
                **LLAMA,
                "vocab_size": VOCABULARY + 8,
                "unpadded_vocab_size": VOCABULARY,
                "num_hidden_layers": 5,
                "head_dim": 16,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 4,
                "swa_head_dim": 8,
                "sliding_window_size": 8,
                "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid", "hybrid_sliding"],
                "d_rel": 4,
                "rel_extent": 16,
                "log_scaling_n_floor": 8,
                "moe_intermediate_size": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_layers_per_attn_res_block": 2,
            },
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "patch_size": 4,
                "mlp_ratio": 2.0,
                "posemb_grid_size": 4,
                "projection_hidden_dim": 48,
                "text_hidden_size": 64,
            },
            "image_token_id": IMAGE_TOKEN,
        },
        pictures=merged_patches,
    ),
    "molmo2": Recipe(
        {
            "text_config": {
                **LLAMA,
                "head_dim": 16,
                "additional_vocab_size": 8,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
                "rope_scaling_layers": [0, 2],
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "image_size": [32, 32],
                "patch_size": 8,
            },
            "adapter_config": {
                "vision_feature_layer": [2, 0],
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "intermediate_size": 48,
                "text_hidden_size": 64,
            },
            "image_patch_id": IMAGE_TOKEN,
            "image_start_token_id": 152,
            "low_res_image_start_token_id": 152,
            "image_end_token_id": 153,
            "frame_start_token_id": 154,
            "frame_end_token_id": 155,
        },
        pictures=overview_and_tiles,
        counts=pooled_counted,
        ids=marked_overview,
        extra=modalities,
    ),
    "llama4": Recipe(
        {
            "text_config": {
                **LLAMA,
                "head_dim": 16,
                "intermediate_size": 32,
                "intermediate_size_mlp": 96,
                "num_local_experts": 4,
                "moe_layers": [2, 3],
                "no_rope_layers": [1, 0, 1, 0],
                "attention_chunk_size": 8,
                "floor_scale": 4,
            },
            "vision_config": {
                **VIT,
                "intermediate_size": 128,
                "projector_input_dim": 48,
                "projector_output_dim": 48,
                "vision_output_dim": 48,
            },
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 152,
            "eoi_token_index": 153,
        },
        counts=last_state_counted,
    ),
    "janus": Recipe(
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": {**VIT, "projection_dim": 64, "num_image_tokens": 16},
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_embeddings": 16,
                "latent_channels": 8,
                "num_res_blocks": 1,
                "projection_dim": 64,
                "image_token_embed_dim": 64,
            },
            "image_token_id": IMAGE_TOKEN,
        }
    ),
    "gemma3n": Recipe(
        {
            "text_config": {
                **LLAMA,
                "num_hidden_layers": 6,
                "head_dim": 16,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
                "num_kv_shared_layers": 2,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 16,
                "laurel_rank": 8,
                "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0, 0.0, 0.0],
            },
            "vision_soft_tokens_per_image": 4,
            "image_token_id": IMAGE_TOKEN,
        },
        needs=("timm",),
    ),
}
