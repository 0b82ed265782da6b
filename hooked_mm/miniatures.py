"""Miniature models: every proved family built from its own transformers configuration, with random weights.

A miniature has all that is peculiar to its family (tiles, windows, gates, deepstack, cross-attention, ...) at a size
that runs in milliseconds. `hooked-mm models` checks these, and so do the tests; nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from hooked_mm.architectures import FAMILIES
from hooked_mm.errors import unknown

VOCABULARY = 200
IMAGE_TOKEN = 150
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_IDS,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_PINPOINTS = [[32, 64], [64, 32], [64, 64]]
_MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 2, 4]}
_QWEN_TEXT = {**_LLAMA, "rope_parameters": _MROPE}
_QWEN_MARKS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 151,
    "vision_start_token_id": 152,
    "vision_end_token_id": 153,
}

# model type -> what its configuration is made of.
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **_LLAMA},
        "vision_config": {"model_type": "clip_vision_model", **_VIT},
        "image_token_index": IMAGE_TOKEN,
    },
    "llava_next": {
        "text_config": {"model_type": "mistral", **_LLAMA},
        "vision_config": {"model_type": "clip_vision_model", **_VIT},
        "image_token_index": IMAGE_TOKEN,
        "image_grid_pinpoints": _PINPOINTS,
    },
    "llava_onevision": {
        "text_config": {"model_type": "qwen2", **_LLAMA},
        "vision_config": {"model_type": "siglip_vision_model", **_VIT, "vision_use_head": False},
        "image_token_index": IMAGE_TOKEN,
        "image_grid_pinpoints": _PINPOINTS,
    },
    "idefics2": {
        "text_config": {"model_type": "mistral", **_LLAMA},
        "vision_config": _VIT,
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
    "idefics3": {
        "text_config": {"model_type": "llama", **_LLAMA},
        "vision_config": _VIT,
        "scale_factor": 2,
        "image_token_id": IMAGE_TOKEN,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **_LLAMA},
        "vision_config": _VIT,
        "scale_factor": 2,
        "image_token_id": IMAGE_TOKEN,
    },
    "qwen2_vl": {
        "text_config": _QWEN_TEXT,
        "vision_config": {"embed_dim": 32, "hidden_size": 64, "depth": 3, "num_heads": 4, "patch_size": 8},
        **_QWEN_MARKS,
    },
    "qwen2_5_vl": {
        "text_config": _QWEN_TEXT,
        "vision_config": {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "depth": 3,
            "num_heads": 4,
            "patch_size": 8,
            "intermediate_size": 48,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        **_QWEN_MARKS,
    },
    "qwen3_vl": {
        "text_config": {**_QWEN_TEXT, "head_dim": 16},
        "vision_config": {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "depth": 3,
            "num_heads": 4,
            "patch_size": 8,
            "intermediate_size": 48,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        },
        **_QWEN_MARKS,
    },
    "gemma3": {
        "text_config": {
            **_LLAMA,
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {"model_type": "siglip_vision_model", **_VIT, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE_TOKEN,
        "boi_token_index": 152,
        "eoi_token_index": 153,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **_LLAMA},
        "vision_config": {**_VIT, "image_size": [32, 32], "patch_size": [8, 8], "use_qk_norm": True},
        "image_token_id": IMAGE_TOKEN,
    },
    "mllama": {
        "text_config": {**_LLAMA, "cross_attention_layers": [1, 3], "num_hidden_layers": 5, "hidden_act": "silu"},
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_global_layers": 2,
            "attention_heads": 4,
            "intermediate_size": 48,
            "vision_output_dim": 96,
            "image_size": 32,
            "patch_size": 8,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 2],
            "norm_eps": 1e-5,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2], [1, 3], [3, 1], [1, 4], [4, 1]],
        },
        "image_token_index": IMAGE_TOKEN,
    },
    "blip-2": {
        "text_config": {
            "model_type": "opt",
            **_IDS,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 512,
        },
        "vision_config": _VIT,
        "qformer_config": {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "encoder_hidden_size": 32,
            "vocab_size": VOCABULARY,
            "cross_attention_frequency": 2,
        },
        "num_query_tokens": 5,
        "image_token_index": IMAGE_TOKEN,
    },
    "florence2": {
        "text_config": {
            "model_type": "bart",
            **_IDS,
            "d_model": 64,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
            "forced_bos_token_id": None,
        },
        "vision_config": {
            "embed_dim": [16, 32],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "depths": [1, 2],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "window_size": 3,
            "projection_dim": 64,
            "drop_path_rate": 0.1,
            "max_position_embeddings": 16,
        },
        "image_token_id": IMAGE_TOKEN,
        "vocab_size": VOCABULARY,
        "is_encoder_decoder": True,
    },
}


def miniature(family: str, *, seed: int = 0) -> Any:
    """A transformers model of a family with random weights, float32, in evaluation mode.

    Every parameter is random, also those which transformers starts at zero or one (gates, layer scales, biases,
    norm gains): what they multiply would otherwise escape any check.

    Raises:
        BadInputError: For a family that has no miniature.
    """
    if family not in CONFIGS:
        raise unknown("miniature of", family, FAMILIES)
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **CONFIGS[family])
        model = AutoModelForImageTextToText.from_config(config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            _randomise(parameter, generator)
    finally:
        torch.set_rng_state(torch_state)
    model.requires_grad_(False)
    return model.eval()


@torch.no_grad()
def _randomise(parameter: Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim < 2 or 1 in parameter.shape:
        # Gains stay near their start, gates and biases leave zero.
        parameter.add_(0.3 * noise)
    else:
        fan_in = parameter[0].numel()
        parameter.copy_(noise / fan_in**0.5)


def vision_inputs(config: Any, images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random pictures as the model's own forward tensors, one image per sample.

    Images differ in size or tiling where the family allows it.
    """
    kind = config.model_type

    def pixels(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind in ("llava_next", "llava_onevision"):
        # A wide, a tall and a square picture: base crop and two or four crops of it, padded to the longest.
        sizes = [[(32, 64), (64, 32), (64, 60)][index % 3] for index in range(images)]
        values = pixels(images, 5, 3, 32, 32)
        for index, size in enumerate(sizes):
            values[index, 3 if 32 in size else 5 :] = 0
        found = {"pixel_values": values, "image_sizes": torch.tensor(sizes)}
        return found | ({"batch_num_images": torch.ones(images, dtype=torch.long)} if kind == "llava_onevision" else {})
    if kind in ("idefics2", "idefics3", "smolvlm"):
        return {
            "pixel_values": pixels(images, 1, 3, 32, 32),
            "pixel_attention_mask": torch.ones(images, 1, 32, 32, dtype=torch.long),
        }
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        grids = [[(1, 4, 6), (1, 6, 4), (1, 4, 4)][index % 3] for index in range(images)]
        patches = sum(t * rows * cols for t, rows, cols in grids)
        return {"pixel_values": pixels(patches, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor(grids)}
    if kind == "mllama":
        mask = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 0, 0]], [[1, 1, 1, 1]]])[torch.arange(images) % 3]
        return {
            "pixel_values": pixels(images, 1, 4, 3, 32, 32) * mask[..., None, None, None],
            "aspect_ratio_ids": torch.tensor([[1], [2], [4]])[torch.arange(images) % 3],
            "aspect_ratio_mask": mask,
        }
    return {"pixel_values": pixels(images, 3, 32, 32)}


def image_token_counts(model: Any, vision: dict[str, Tensor]) -> list[int]:
    """How many positions each image takes, asked of the model itself."""
    if model.config.model_type == "mllama":
        return [1] * vision["pixel_values"].shape[0]
    with torch.no_grad():
        features = model.get_image_features(**vision, return_dict=True).pooler_output
    return [len(part) for part in features]


def miniature_inputs(model: Any, samples: int = 3, *, padding_side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Forward tensors of a batch with one image per sample, prompts of different lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    kind = model.config.model_type
    vision = vision_inputs(model.config, samples, generator)
    rows = []
    for index, count in enumerate(image_token_counts(model, vision)):
        before, after = (torch.randint(3, 140, (2 + index,), generator=generator).tolist() for _ in range(2))
        rows.append([1, *before, *[IMAGE_TOKEN] * count, *after])
    width = max(map(len, rows))
    ids = torch.zeros(samples, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if padding_side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask, **vision}
    is_image = (ids == IMAGE_TOKEN).long()
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        inputs["mm_token_type_ids"] = is_image
    if kind == "gemma3":
        inputs["token_type_ids"] = is_image
    if kind == "mllama":
        # Text behind the image token attends to the image's real tiles.
        seen = (is_image.cumsum(dim=1) > 0).long()
        inputs["cross_attention_mask"] = seen[:, :, None, None] * vision["aspect_ratio_mask"][:, None]
    if kind == "florence2":
        inputs["decoder_input_ids"] = torch.randint(3, 140, (samples, 5), generator=generator)
        inputs["decoder_input_ids"][:, 0] = model.config.text_config.decoder_start_token_id
    return inputs
