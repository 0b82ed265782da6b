"""Miniatures whose text attends to a tower from outside: cross-attention to an image encoder, and image prefixes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from hooked_mm.testing.recipe import IDS, IMAGE_TOKEN, VIT, VOCABULARY, Inputs, Recipe, no_positions


def patches(config: Any, images: int, generator: Generator) -> Inputs:
    """Flattened patches of a wide, a tall and a small picture, each behind its row and column; zeros fill up."""
    values = torch.zeros(images, 12, 2 + 12)
    for index in range(images):
        rows, columns = [(2, 6), (4, 2), (3, 3)][index % 3]
        places = torch.cartesian_prod(torch.arange(1.0, rows + 1), torch.arange(1.0, columns + 1))
        content = torch.randn(rows * columns, 12, generator=generator)
        values[index, : rows * columns] = torch.cat([places, content], dim=1)
    found = {"flattened_patches": values}
    if config.model_type == "pix2struct":
        found["attention_mask"] = (values != 0).any(dim=-1).long()
    return found


def marked_run(count: int) -> list[int]:
    """Ordinary ids between two marks: which positions hold features is said by a mask alone (Kosmos)."""
    return [151, *range(4, 4 + count), 152]


def latent_queries(model: Any, pictures: Inputs) -> list[int]:
    """As many positions as there are latent queries."""
    return [model.config.latent_query_num] * len(next(iter(pictures.values())))


def position_mask(config: Any, inputs: Inputs) -> Inputs:
    """1 between the marks around an image."""
    ids = inputs["input_ids"]
    opened, closed = ((ids == mark).long().cumsum(dim=1) for mark in (151, 152))
    return {"image_embeds_position_mask": ((opened > closed) & (ids != 151)).long()}


def one_image(config: Any, images: int, generator: Generator) -> Inputs:
    """(samples, images of a sample, 3, 32, 32)."""
    return {"pixel_values": torch.randn(images, 1, 3, 32, 32, generator=generator)}


def one_mark(model: Any, pictures: Inputs) -> list[int]:
    """One token marks each image and is text."""
    return [1] * len(pictures["pixel_values"])


def seen_images(config: Any, inputs: Inputs) -> Inputs:
    """Text from the mark on attends to the image."""
    return {"image_attention_mask": ((inputs["input_ids"] == IMAGE_TOKEN).long().cumsum(dim=1) > 0).long()[..., None]}


_KOSMOS = {
    **IDS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "embed_dim": 64,
    "layers": 4,
    "ffn_dim": 96,
    "attention_heads": 4,
}

RECIPES: dict[str, Recipe] = {
    "blip": Recipe(
        {
            "text_config": {
                **IDS,
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 96,
                "projection_dim": 32,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 128,
            },
            "vision_config": VIT,
        },
        counts=no_positions,
    ),
    "git": Recipe(
        {
            **IDS,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
            "vision_config": VIT,
        },
        counts=no_positions,
    ),
    "idefics": Recipe(
        {
            **IDS,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "vocab_size": VOCABULARY,
            "additional_vocab_size": 2,
            "cross_layer_interval": 2,
            "qk_layer_norms": True,
            "use_resampler": True,
            "vision_config": {"embed_dim": 32, **{name: VIT[name] for name in VIT if name != "hidden_size"}},
            "perceiver_config": {
                "use_resampler": True,
                "resampler_n_latents": 5,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "qk_layer_norms_perceiver": True,
            },
        },
        pictures=one_image,
        counts=one_mark,
        extra=seen_images,
    ),
    "kosmos-2": Recipe(
        {"text_config": _KOSMOS, "vision_config": VIT, "latent_query_num": 5},
        counts=latent_queries,
        ids=marked_run,
        extra=position_mask,
    ),
    "kosmos-2.5": Recipe(
        {
            "text_config": _KOSMOS,
            "vision_config": {
                "hidden_size": 32,
                "patch_embed_hidden_size": 12,
                "intermediate_size": 48,
                "head_dim": 8,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "max_num_patches": 16,
            },
            "latent_query_num": 5,
        },
        pictures=patches,
        counts=latent_queries,
        ids=marked_run,
        extra=position_mask,
    ),
    "pix2struct": Recipe(
        {
            "text_config": {
                "hidden_size": 64,
                "d_kv": 16,
                "d_ff": 96,
                "num_layers": 4,
                "num_heads": 4,
                "relative_attention_num_buckets": 8,
                "relative_attention_max_distance": 16,
                "vocab_size": VOCABULARY,
            },
            "vision_config": {
                "hidden_size": 64,
                "patch_embed_hidden_size": 12,
                "d_ff": 48,
                "d_kv": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "seq_len": 16,
            },
        },
        pictures=patches,
        counts=no_positions,
        prefix="decoder_",
    ),
    "pp_formulanet": Recipe(
        {
            "text_config": {
                **IDS,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 128,
                "d_model": 64,
                "decoder_layers": 3,
                "decoder_ffn_dim": 96,
                "decoder_attention_heads": 4,
                "decoder_start_token_id": 2,
                "forced_eos_token_id": None,
            },
            "vision_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 8,
                "window_size": 3,
                "global_attn_indexes": [1, 3],
                "mlp_dim": 48,
                "post_conv_in_channels": 16,
                "post_conv_mid_channels": 24,
                "post_conv_out_channels": 40,
                "decoder_hidden_size": 64,
            },
        },
        pictures=lambda config, images, generator: {
            "pixel_values": torch.randn(images, 3, 64, 64, generator=generator)
        },
        counts=no_positions,
        prefix="decoder_",
    ),
    "vision-encoder-decoder": Recipe(
        {
            "encoder": {"model_type": "vit", **VIT},
            "decoder": {
                "model_type": "trocr",
                **IDS,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 128,
                "d_model": 64,
                "decoder_layers": 4,
                "decoder_ffn_dim": 96,
                "decoder_attention_heads": 4,
                "is_decoder": True,
                "add_cross_attention": True,
            },
        },
        counts=no_positions,
        prefix="decoder_",
    ),
    "evolla": Recipe({}, why_not="it reads proteins (sequences of residues with their structure), not pictures"),
}
