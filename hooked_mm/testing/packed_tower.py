"""Miniatures whose tower takes the patches of all images as one sequence (Qwen-VL and its kin)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator

from hooked_mm.testing.recipe import IMAGE_TOKEN, LLAMA, Inputs, Recipe, image_run

_MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 2, 4]}
QWEN_TEXT = {**LLAMA, "rope_parameters": _MROPE}
QWEN_TOWER = {
    "hidden_size": 32,
    "out_hidden_size": 64,
    "depth": 3,
    "num_heads": 4,
    "patch_size": 8,
    "intermediate_size": 48,
}
WINDOWS = {"window_size": 32, "fullatt_block_indexes": [1]}
DEEPSTACK = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
QWEN_MARKS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 151,
    "vision_start_token_id": 152,
    "vision_end_token_id": 153,
}


def patches(*shape: int) -> Callable[[Any, int, Generator], Inputs]:
    """Pictures of three shapes, cut into patches of this shape, one behind the other."""

    def pictures(config: Any, images: int, generator: Generator) -> Inputs:
        sizes = torch.tensor([[(1, 4, 6), (1, 6, 4), (1, 4, 4)][index % 3] for index in range(images)])
        count = int(sizes.prod(dim=1).sum())
        return {"pixel_values": torch.randn(count, *shape, generator=generator), "image_grid_thw": sizes}

    return pictures


grids = patches(3 * 2 * 8 * 8)
ONE_FRAME = patches(3 * 8 * 8)


def modality_ids(config: Any, inputs: Inputs) -> Inputs:
    """1 at image tokens, from which the three rotary positions are counted."""
    return {"mm_token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}


def marked(count: int) -> list[int]:
    """The mark of a picture's beginning, by which older versions of transformers find it, and its tokens."""
    return [QWEN_MARKS["vision_start_token_id"], *image_run(count)]


RECIPES: dict[str, Recipe] = {
    "qwen2_vl": Recipe(
        {
            "text_config": QWEN_TEXT,
            "vision_config": {"embed_dim": 32, "hidden_size": 64, "depth": 3, "num_heads": 4, "patch_size": 8},
            **QWEN_MARKS,
        },
        pictures=grids,
        ids=marked,
        extra=modality_ids,
    ),
    "qwen2_5_vl": Recipe(
        {"text_config": QWEN_TEXT, "vision_config": {**QWEN_TOWER, **WINDOWS}, **QWEN_MARKS},
        pictures=grids,
        ids=marked,
        extra=modality_ids,
    ),
    "qwen3_vl": Recipe(
        {
            "text_config": {**QWEN_TEXT, "head_dim": 16},
            "vision_config": {**QWEN_TOWER, **DEEPSTACK},
            **QWEN_MARKS,
        },
        pictures=grids,
        ids=marked,
        extra=modality_ids,
    ),
}
