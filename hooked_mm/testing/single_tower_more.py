"""More miniatures of one tower, one projector, one decoder: sizes of images told, patches packed, layers' features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from hooked_mm.testing.packed_tower import DEEPSTACK, QWEN_MARKS, QWEN_TOWER, modality_ids, patches
from hooked_mm.testing.recipe import IMAGE_TOKEN, LLAMA, VIT, Inputs, Recipe, image_run
from hooked_mm.testing.single_tower import PINPOINTS, SIGLIP, SLIDING, tiled

_PIXTRAL = {"model_type": "pixtral", **VIT, "num_hidden_layers": 4}
_SAM = {
    "hidden_size": 32,
    "output_channels": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    # 8 patches a side are not a multiple of it: windows are padded.
    "window_size": 5,
    "global_attn_indexes": [1, 3],
    "mlp_dim": 48,
}
_GRANITE = {
    **LLAMA,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
}


def sized(config: Any, images: int, generator: Generator) -> Inputs:
    """A square, a wide and a tall picture, padded to a square, and how large each is (Pixtral)."""
    sizes = torch.tensor([[32, 32], [16, 32], [32, 16]])[torch.arange(images) % 3]
    values = torch.randn(images, 3, 32, 32, generator=generator)
    for index, (height, width) in enumerate(sizes.tolist()):
        values[index, :, height:], values[index, :, :, width:] = 0, 0
    return {"pixel_values": values, "image_sizes": sizes}


def patches_padded(config: Any, images: int, generator: Generator) -> Inputs:
    """Patches of a square, a wide and a tall picture, padded to as many as the square has (SigLIP 2)."""
    shapes = torch.tensor([[4, 4], [2, 4], [6, 2]])[torch.arange(images) % 3]
    mask = (torch.arange(16) < shapes.prod(dim=1, keepdim=True)).long()
    values = torch.randn(images, 16, 3 * 8 * 8, generator=generator) * mask[:, :, None]
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def page_tiles(config: Any, images: int, generator: Generator) -> Inputs:
    """One page as it is, one as two tiles, one as four, these with the whole; filled up with empty tiles (Docling)."""
    mask = torch.arange(5) < torch.tensor([1, 3, 5])[torch.arange(images) % 3, None]
    values = torch.randn(images, 5, 3, 32, 32, generator=generator) * mask[..., None, None, None]
    return {"pixel_values": values, "pixel_attention_mask": mask}


def marked_tiles(count: int) -> list[int]:
    """A mark and four tokens per tile, a line break behind each row of two, at last the whole (Docling)."""
    fake, line, whole = 160, 161, 162
    tiles, found = count // 4, []
    for tile in range(max(1, tiles - 1)):
        found += [fake, 163 + tile, *image_run(4)]
        if tile % 2 or tile + 2 > tiles - 1:
            found.append(line)
    return [*found, fake, whole, *image_run(4), fake] if tiles > 1 else found


def image_of_two_towers(config: Any, images: int, generator: Generator) -> Inputs:
    """Pictures beside which there could be videos: they have a name of their own (Video-LLaVA)."""
    return {"pixel_values_images": torch.randn(images, 3, 32, 32, generator=generator)}


def sixteen(model: Any, pictures: Inputs) -> list[int]:
    """The 4 x 4 patches of each picture."""
    return [16] * len(next(iter(pictures.values())))


def deepstacked(model: Any, pictures: Inputs) -> list[int]:
    """As many as each of the layers' features (Granite 4 Vision)."""
    with torch.no_grad():
        return [len(part) for part in model.get_image_features(**pictures, return_dict=True).deepstack_features[0][1]]


def one_large_picture(config: Any, images: int, generator: Generator) -> Inputs:
    """Large enough for a tower of convolutions, which makes it 64 times smaller (FastVLM)."""
    return {"pixel_values": torch.randn(images, 3, 128, 128, generator=generator)}


def one_tile(config: Any, images: int, generator: Generator) -> Inputs:
    """One tile per sample (Perception LM)."""
    return {"pixel_values": torch.randn(images, 1, 3, 32, 32, generator=generator)}


RECIPES: dict[str, Recipe] = {
    "fast_vlm": Recipe(
        {
            "text_config": {"model_type": "qwen2", **LLAMA},
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "fastvit_mci3",
                "do_pooling": True,
                # The last convolution doubles its width.
                "hidden_size": 64,
                "model_args": {
                    "inference_mode": True,
                    "layers": [2, 2, 2, 2, 2],
                    "embed_dims": [8, 8, 16, 32, 32],
                },
            },
            "image_token_index": IMAGE_TOKEN,
        },
        pictures=one_large_picture,
        needs=("timm",),
    ),
    "perception_lm": Recipe(
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_lang_large_patch14_448",
                "do_pooling": False,
                "model_args": {
                    "img_size": [32, 32],
                    "patch_size": 8,
                    "embed_dim": 32,
                    "depth": 3,
                    "num_heads": 4,
                    "mlp_ratio": 1.5,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": [4, 4],
                },
            },
            "projector_pooling_ratio": 2,
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 151,
        },
        pictures=one_tile,
        needs=("timm",),
    ),
    "cohere_compass": Recipe(
        {
            "text_config": {
                **LLAMA,
                **SLIDING,
                "logit_scale": 0.25,
                # Full layers have no rotary positions.
                "rope_parameters": {
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [4, 2, 2]},
                    "full_attention": None,
                },
            },
            "vision_config": {**QWEN_TOWER, **DEEPSTACK},
            **QWEN_MARKS,
        },
        pictures=patches(3 * 2 * 8 * 8),
        extra=modality_ids,
    ),
    "got_ocr2": Recipe(
        {
            "text_config": {"model_type": "qwen2", **LLAMA},
            "vision_config": _SAM,
            "image_token_index": IMAGE_TOKEN,
        }
    ),
    "pp_chart2table": Recipe(
        {
            "text_config": {"model_type": "qwen2", **LLAMA},
            "vision_config": _SAM,
            "image_token_index": IMAGE_TOKEN,
        }
    ),
    "video_llava": Recipe(
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": {"model_type": "clip_vision_model", **VIT},
            "image_token_index": IMAGE_TOKEN,
            "video_token_index": 151,
        },
        pictures=image_of_two_towers,
        counts=sixteen,
    ),
    "mistral3": Recipe(
        {
            "text_config": {"model_type": "mistral", **LLAMA, "head_dim": 16},
            "vision_config": _PIXTRAL,
            "image_token_index": IMAGE_TOKEN,
        },
        pictures=sized,
    ),
    "mistral4": Recipe(
        {},
        why_not="transformers maps it to Mistral4ForCausalLM, a decoder of text: it has no tower and takes no picture",
    ),
    "mistral_large4": Recipe(
        {
            "text_config": {
                **LLAMA,
                "num_hidden_layers": 6,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 48,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "kv_lora_rank": 24,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 12,
                "index_topk": 8,
                "index_head_dim": 16,
                "index_n_heads": 2,
                "first_k_dense_replace": 2,
                "no_rope_layers": [1, 0, 1, 0, 1, 0],
                "kv_source_layers": [0, 1, 0, 1, 4, 5],
                "indexer_types": ["full", "full", "shared", "full", "shared", "shared"],
            },
            "vision_config": {**_PIXTRAL, "hidden_act": "silu"},
            "image_token_index": IMAGE_TOKEN,
        },
        pictures=sized,
    ),
    "lighton_ocr": Recipe(
        {
            "text_config": {"model_type": "qwen3", **LLAMA, "head_dim": 16},
            "vision_config": _PIXTRAL,
            "image_token_id": IMAGE_TOKEN,
        },
        pictures=sized,
    ),
    "granite4_vision": Recipe(
        {
            "text_config": {**_GRANITE, "num_hidden_layers": 7},
            # The Q-Formers have heads of 64.
            "vision_config": {**SIGLIP, "hidden_size": 64},
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "num_hidden_layers": 1,
                "intermediate_size": 96,
                "cross_attention_frequency": 1,
                "use_qformer_text_input": False,
            },
            "image_token_index": IMAGE_TOKEN,
            "image_grid_pinpoints": PINPOINTS,
            "vision_feature_select_strategy": "full",
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-2, 1], [-1, 0]],
            "spatial_target_layers": [2, 3, 4, 5],
        },
        pictures=tiled,
        counts=deepstacked,
    ),
    "granite_docling": Recipe(
        {
            "text_config": _GRANITE,
            "vision_config": {
                **VIT,
                "patch_size": 4,
                "out_hidden_size": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            "image_token_id": IMAGE_TOKEN,
            "pad_token_id": 0,
            "density_router_hidden_size": 16,
        },
        pictures=page_tiles,
        ids=marked_tiles,
    ),
    "lfm2_vl": Recipe(
        {
            "text_config": {
                "model_type": "lfm2",
                **LLAMA,
                "num_hidden_layers": 5,
                "block_auto_adjust_ff_dim": False,
                "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
            },
            "vision_config": {
                "model_type": "siglip2_vision_model",
                **{key: value for key, value in VIT.items() if key != "image_size"},
                "num_patches": 16,
                "vision_use_head": False,
            },
            "image_token_id": IMAGE_TOKEN,
            "projector_hidden_size": 48,
        },
        pictures=patches_padded,
    ),
    "lfm3_vl": Recipe(
        {
            "text_config": {
                "model_type": "lfm3",
                **LLAMA,
                "num_hidden_layers": 6,
                "head_dim": 16,
                "sliding_window": 8,
                "layer_types": ["conv", "full_attention", "sliding_attention"] * 2,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "patch_size": 8,
                "num_hidden_layers": 5,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
            },
            "projector_hidden_size": 48,
            **QWEN_MARKS,
        },
        pictures=patches(3 * 2 * 8 * 8),
    ),
}
