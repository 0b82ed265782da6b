"""Miniatures without a tower of attention blocks: discrete image tokens, projected patches; and a robot's policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator

from hooked_mm.testing.recipe import IDS, IMAGE_TOKEN, LLAMA, VIT, VOCABULARY, Inputs, Recipe, build_from_config

SEPARATOR = 159
_CODES = 32
_FIRST_CODE = 160
_VQ = {"base_channels": 32, "channel_multiplier": [1, 1, 1, 2], "num_res_blocks": 1, "embed_dim": 8}
_ACTIONS, _STEPS = 8, 5
POSITIONED = [(4, 6), (6, 4), (4, 4)]


def _letters(number: int) -> str:
    """A number in the letters A to J, as Chameleon's tokenizer names its image tokens."""
    return "".join(chr(ord("A") + int(digit)) for digit in str(number))


def sized_pictures(config: Any, images: int, generator: Generator) -> Inputs:
    """A square, a tall and a wide picture, padded to one size."""
    sizes = [[(32, 32), (32, 24), (24, 32)][index % 3] for index in range(images)]
    values = torch.randn(images, 3, 32, 32, generator=generator)
    for index, (height, width) in enumerate(sizes):
        values[index, :, height:] = 0
        values[index, :, :, width:] = 0
    return {"pixel_values": values, "image_sizes": torch.tensor(sizes)}


def twelve_patches(config: Any, images: int, generator: Generator) -> Inputs:
    """Three rows of four patches of 8 x 8 pixels per picture."""
    return {"pixel_values": torch.randn(images, 12, 3 * 8 * 8, generator=generator)}


def patches_counted(model: Any, pictures: Inputs) -> list[int]:
    """One position per patch."""
    count, patches = pictures["pixel_values"].shape[:2]
    return [patches] * count


def rows_of_four(count: int) -> list[int]:
    """Image tokens with a newline, which is text, behind every fourth."""
    return [token for _ in range(count // 4) for token in (*[IMAGE_TOKEN] * 4, SEPARATOR)]


def positioned_patches(config: Any, images: int, generator: Generator) -> Inputs:
    """Pictures of three shapes, cut into patches of 8 x 8 pixels that say where they stand; padding stands at -1."""
    shapes = [POSITIONED[index % 3] for index in range(images)]
    longest = max(rows * columns for rows, columns in shapes)
    values = torch.rand(images, longest, 3 * 8 * 8, generator=generator)
    places = torch.full((images, longest, 2), -1)
    for index, (rows, columns) in enumerate(shapes):
        count = rows * columns
        values[index, count:] = 0
        places[index, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    return {"pixel_values": values, "image_position_ids": places}


def modalities(config: Any, inputs: Inputs) -> Inputs:
    """1 at image tokens: those of one image attend to each other both ways."""
    return {"mm_token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}


def with_scaled_stream(family: str, settings: Mapping[str, Any]) -> Any:
    """Factors that are buffers, as in trained models: transformers starts them at one, or not at all.

    Scores are not divided by the square root of d_head here, so gains of queries are small.
    """
    model = build_from_config(family, settings)
    for name, gain in model.named_parameters():
        if name.endswith("q_norm.weight"):
            gain.data.fill_(0.3)
    for name, buffer in model.named_buffers():
        if name.endswith(("layer_scalar", "std_scale")):
            buffer.uniform_(0.5, 0.9)
        elif name.endswith("std_bias"):
            buffer.normal_(std=0.3)
    return model


_SIZES = (6, 6, 4)


def loose_patches(config: Any, images: int, generator: Generator) -> Inputs:
    """Two frames of 8 x 8 pixels per patch, one behind the other, pictures of six or four patches."""
    total = sum(_SIZES[index % 3] for index in range(images))
    return {"pixel_values": torch.randn(total, 2, 8, 8, 3, generator=generator)}


def loose_patches_counted(model: Any, pictures: Inputs) -> list[int]:
    """Six, six and four patches, in turns."""
    left, counts = len(pictures["pixel_values"]), list[int]()
    while left > 0:
        counts.append(_SIZES[len(counts) % 3])
        left -= counts[-1]
    return counts


def cameras(config: Any, images: int, generator: Generator) -> Inputs:
    """Two cameras per sample, the second of every other sample switched off; a state, and noise to make actions of."""
    mask = torch.ones(images, 2, dtype=torch.bool)
    mask[1::2, 1] = False
    return {
        "pixel_values": torch.randn(images, 2, 3, 32, 32, generator=generator) * mask[..., None, None, None],
        "pixel_attention_mask": mask,
        "state": torch.randn(images, _ACTIONS, generator=generator),
        "noise": torch.randn(images, _STEPS, _ACTIONS, generator=generator),
        "timestep": torch.full((images,), 0.5),
    }


def cameras_counted(model: Any, pictures: Inputs) -> list[int]:
    """Sixteen patches per camera that is on."""
    return [16 * int(count) for count in pictures["pixel_attention_mask"].sum(dim=1)]


GEMMA4_TEXT: dict[str, Any] = {
    **LLAMA,
    "num_hidden_layers": 6,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 8,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": "vision",
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
SHARED_KEYS = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
"""The last two layers attend to earlier layers' keys and values."""
GEMMA4_MARKS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 151,
    "boi_token_id": 152,
    "eoi_token_id": 153,
    "audio_token_id": 154,
    "boa_token_id": 155,
    "eoa_token_index": 156,
}

RECIPES: dict[str, Recipe] = {
    "chameleon": Recipe(
        {
            **LLAMA,
            "vq_config": {**_VQ, "num_embeddings": _CODES, "latent_channels": 8, "resolution": 32},
            "vocabulary_map": {
                "<image>": IMAGE_TOKEN,
                **{f"IMGIMG{_letters(code)}Z": _FIRST_CODE + code for code in range(_CODES)},
            },
        }
    ),
    "emu3": Recipe(
        {
            "text_config": LLAMA,
            "vq_config": {**_VQ, "codebook_size": _CODES, "temporal_downsample_factor": 2, "hidden_size": 64},
            "vocabulary_map": {
                "<image>": IMAGE_TOKEN,
                "<|extra_200|>": SEPARATOR,
                **{f"<|visual token {code:06}|>": _FIRST_CODE + code for code in range(_CODES)},
            },
        },
        pictures=sized_pictures,
    ),
    "fuyu": Recipe(
        {
            "text_config": {
                "model_type": "persimmon",
                **IDS,
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 96,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 512,
                "hidden_act": "relu2",
                "qk_layernorm": True,
                "partial_rotary_factor": 0.5,
            },
            "patch_size": 8,
            "image_token_id": IMAGE_TOKEN,
        },
        pictures=twelve_patches,
        counts=patches_counted,
        ids=rows_of_four,
    ),
    "gemma4_unified": Recipe(
        {
            "text_config": {**GEMMA4_TEXT, **SHARED_KEYS},
            "vision_config": {
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 48,
                "output_proj_dims": 48,
                "mm_posemb_size": 8,
            },
            **GEMMA4_MARKS,
        },
        pictures=positioned_patches,
        extra=modalities,
        build=with_scaled_stream,
    ),
    "inkling_mm_model": Recipe(
        {
            "text_config": {
                **LLAMA,
                "vocab_size": VOCABULARY + 8,
                "unpadded_vocab_size": VOCABULARY,
                "head_dim": 16,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 4,
                "swa_head_dim": 8,
                "sliding_window_size": 8,
                "layer_types": ["hybrid_sliding", "hybrid"] * 2,
                "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
                "d_rel": 4,
                "rel_extent": 16,
                "log_scaling_n_floor": 8,
                "moe_intermediate_size": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "logits_mup_width_multiplier": 2.0,
            },
            "vision_config": {"patch_size": 8, "num_hidden_layers": 4},
            "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8},
            "image_token_id": IMAGE_TOKEN,
            "audio_token_id": 154,
            "image_bos_token_id": 152,
            "audio_bos_token_id": 155,
        },
        pictures=loose_patches,
        counts=loose_patches_counted,
    ),
    "pi0": Recipe(
        {
            "vlm_config": {
                "model_type": "paligemma",
                "text_config": {"model_type": "gemma", **LLAMA, "head_dim": 16},
                "vision_config": {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False},
                "projection_dim": 64,
                "image_token_id": IMAGE_TOKEN,
            },
            "dit_config": {"model_type": "gemma", **LLAMA, "hidden_size": 32, "head_dim": 16},
            "chunk_size": _STEPS,
            "max_state_dim": _ACTIONS,
            "max_action_dim": _ACTIONS,
        },
        pictures=cameras,
        counts=cameras_counted,
    ),
}
