"""Miniatures of the architectures that transformers lacks and this package brings: Molmo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from hooked_mm.molmo import MolmoConfig, MolmoForCausalLM, MolmoImageProcessor
from hooked_mm.testing.recipe import IDS, IMAGE_TOKEN, LLAMA, VIT, VOCABULARY, Inputs, Recipe

_ADDED = 60
_START, _END, _COLUMN = IMAGE_TOKEN + 1, IMAGE_TOKEN + 2, IMAGE_TOKEN + 3
_IMAGES = MolmoImageProcessor(
    overlap_margins=(2, 0),
    base_image_input_size=(32, 32),
    image_token_length_w=2,
    image_token_length_h=2,
    image_patch_size=8,
)


def _crops(config: Any, images: int, generator: Generator) -> Inputs:
    """Pictures cut into one, two, ... crops side by side beside the whole; positions count from each one's first."""
    orders = [_IMAGES.order(1, index % 3 + 1) for index in range(images)]
    most = max(map(len, orders))
    shape = (images, most, _IMAGES.side**2, 3 * _IMAGES.image_patch_size**2)
    pixels, masks = torch.full(shape, -1.0), torch.full(shape[:3], -1.0)
    index = torch.full((images, most, orders[0].shape[1]), -1)
    for row, order in enumerate(orders):
        pixels[row, : len(order)] = torch.randn(len(order), *shape[2:], generator=generator)
        # Patches that are padding, padding in part, and picture.
        masks[row, : len(order)] = torch.randint(0, 3, (len(order), shape[2]), generator=generator) / 2
        index[row, : len(order)] = order
    return {"images": pixels, "image_masks": masks, "image_input_idx": index}


def _counts(model: Any, pictures: Inputs) -> list[int]:
    return [int((index >= 0).sum()) for index in pictures["image_input_idx"]]


def _ids(count: int) -> list[int]:
    """Two rows of two for the whole, then two rows of the crops, each with a mark behind it."""
    cols = (count - 4) // 2
    return [id_ for wide in (2, cols) for id_ in (_START, *[*[IMAGE_TOKEN] * wide, _COLUMN] * 2, _END)]


def _placed(config: Any, inputs: Inputs) -> Inputs:
    """The positions in the whole sequence."""
    index: Tensor = inputs["image_input_idx"]
    found = torch.full_like(index, -100)
    for row, ids in enumerate(inputs["input_ids"]):
        places = (ids == IMAGE_TOKEN).nonzero()[:, 0]
        found[row] = torch.where(index[row] >= 0, places[index[row].clamp_min(0)], -100)
    return {"image_input_idx": found}


def _build(family: str, settings: Mapping[str, Any]) -> MolmoForCausalLM:
    # transformers chooses attention functions for models that it makes by itself.
    return MolmoForCausalLM._from_config(MolmoConfig(**settings))


RECIPES: dict[str, Recipe] = {
    "molmo": Recipe(
        {
            **LLAMA,
            **IDS,
            "vocab_size": VOCABULARY - _ADDED,
            "additional_vocab_size": _ADDED,
            "intermediate_size": 2 * LLAMA["intermediate_size"],
            "image_patch_id": IMAGE_TOKEN,
            # Of four blocks the last is not read.
            "vision_config": {**VIT, "num_hidden_layers": 4},
            "vision_feature_layer": [-2, -4],
        },
        pictures=_crops,
        counts=_counts,
        ids=_ids,
        extra=_placed,
        build=_build,
    ),
}
