"""Miniatures of other plans: cross-attention, encoder-decoders, Q-Formers, prefixes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from hooked_mm.testing.recipe import IDS, IMAGE_TOKEN, LLAMA, VIT, VOCABULARY, Inputs, Recipe, image_run, no_positions


def tiles(config: Any, images: int, generator: Generator) -> Inputs:
    """One, two and four tiles of an image, filled up with empty ones (Mllama)."""
    mask = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 0, 0]], [[1, 1, 1, 1]]])[torch.arange(images) % 3]
    return {
        "pixel_values": torch.randn(images, 1, 4, 3, 32, 32, generator=generator) * mask[..., None, None, None],
        "aspect_ratio_ids": torch.tensor([[1], [2], [4]])[torch.arange(images) % 3],
        "aspect_ratio_mask": mask,
    }


def one_token(model: Any, pictures: Inputs) -> list[int]:
    """One token per image, which is text: cross-attention."""
    return [1] * len(pictures["pixel_values"])


def seen_tiles(config: Any, inputs: Inputs) -> Inputs:
    """Text behind the image token attends to the image's real tiles (Mllama)."""
    seen = ((inputs["input_ids"] == IMAGE_TOKEN).long().cumsum(dim=1) > 0).long()
    return {"cross_attention_mask": seen[:, :, None, None] * inputs["aspect_ratio_mask"][:, None]}


def decoder_ids(config: Any, inputs: Inputs) -> Inputs:
    """Five tokens of an answer for the decoder of an encoder-decoder."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 140, (len(inputs["input_ids"]), 5), generator=generator)
    start = getattr(config.get_text_config(), "decoder_start_token_id", None)
    ids[:, 0] = config.get_text_config().bos_token_id if start is None else start
    return {"decoder_input_ids": ids}


def queries(model: Any, pictures: Inputs) -> list[int]:
    """As many positions as there are queries, for every frame of a sample."""
    values = pictures["pixel_values"]
    return [model.config.num_query_tokens * (values.shape[1] if values.ndim == 5 else 1)] * len(values)


def instruction(config: Any, inputs: Inputs) -> Inputs:
    """Instructions of different lengths for the Q-Former."""
    samples = len(inputs["input_ids"])
    mask = (torch.arange(samples + 2) < torch.arange(samples)[:, None] + 3).long()
    ids = torch.randint(3, 140, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"qformer_input_ids": ids * mask, "qformer_attention_mask": mask}


def frames(config: Any, images: int, generator: Generator) -> Inputs:
    """Four frames per sample (InstructBLIP-Video)."""
    return {"pixel_values": torch.randn(images, 4, 3, 32, 32, generator=generator)}


def boxes(config: Any, inputs: Inputs) -> Inputs:
    """Where each token stands on the page; zeros for tokens that stand nowhere; several tokens on one patch."""
    ids = inputs["input_ids"]
    corner = torch.rand(*ids.shape, 2, generator=torch.Generator().manual_seed(1)) * 0.7
    found = torch.cat([corner, corner + 0.2], dim=-1)
    found[:, -1] = found[:, -2]
    nowhere = (inputs["attention_mask"] == 0) | (ids == config.bos_token_id)
    return {"bbox": found.masked_fill(nowhere[..., None], 0.0), **decoder_ids(config, inputs)}


_OPT = {
    "model_type": "opt",
    **IDS,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
_QFORMER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "encoder_hidden_size": 32,
    "vocab_size": VOCABULARY,
    "cross_attention_frequency": 2,
}
_T5GEMMA = {
    **LLAMA,
    "head_dim": 16,
    "sliding_window": 8,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

RECIPES: dict[str, Recipe] = {
    "mllama": Recipe(
        {
            "text_config": {**LLAMA, "cross_attention_layers": [1, 3], "num_hidden_layers": 5, "hidden_act": "silu"},
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
        pictures=tiles,
        counts=one_token,
        extra=seen_tiles,
    ),
    "blip-2": Recipe(
        {
            "text_config": _OPT,
            "vision_config": VIT,
            "qformer_config": _QFORMER,
            "num_query_tokens": 5,
            "image_token_index": IMAGE_TOKEN,
        }
    ),
    "florence2": Recipe(
        {
            "text_config": {
                "model_type": "bart",
                **IDS,
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
        extra=decoder_ids,
    ),
    "instructblip": Recipe(
        {
            "text_config": _OPT,
            "vision_config": VIT,
            "qformer_config": _QFORMER,
            "num_query_tokens": 5,
            "image_token_index": IMAGE_TOKEN,
        },
        counts=queries,
        extra=instruction,
    ),
    "instructblipvideo": Recipe(
        {
            "text_config": _OPT,
            "vision_config": VIT,
            "qformer_config": _QFORMER,
            "num_query_tokens": 5,
            "video_token_index": IMAGE_TOKEN,
        },
        pictures=frames,
        counts=queries,
        extra=instruction,
    ),
    "t5gemma2": Recipe(
        {
            "encoder": {
                "text_config": _T5GEMMA,
                "vision_config": {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False},
                "mm_tokens_per_image": 4,
                "boi_token_index": 152,
                "eoi_token_index": 153,
            },
            "decoder": {**_T5GEMMA, "final_logit_softcapping": 30.0},
            "image_token_index": IMAGE_TOKEN,
        },
        ids=lambda count: [152, *image_run(count), 153],
        extra=decoder_ids,
    ),
    "udop": Recipe(
        {
            **IDS,
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 3,
            "num_heads": 4,
            "max_2d_position_embeddings": 64,
            "image_size": 32,
            "patch_size": 8,
            "decoder_start_token_id": 0,
        },
        counts=no_positions,
        extra=boxes,
    ),
}
