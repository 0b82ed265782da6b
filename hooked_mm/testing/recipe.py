"""What a miniature is made of: a small configuration, pictures as the model's own tensors, and where they stand.

A `Recipe` is one row of a table per kind of architecture (`single_tower`, `packed_tower`, ...). Most rows are a
configuration and nothing else; the functions here are what the others share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

VOCABULARY = 200
IMAGE_TOKEN = 150
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **IDS,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}

Inputs = dict[str, Tensor]


def one_picture(config: Any, images: int, generator: Generator) -> Inputs:
    """`pixel_values` (images, 3, 32, 32)."""
    return {"pixel_values": torch.randn(images, 3, 32, 32, generator=generator)}


def features_counted(model: Any, pictures: Inputs) -> list[int]:
    """How many positions each image takes, asked of the model itself."""
    owner = model if hasattr(model, "get_image_features") else model.base_model
    with torch.no_grad():
        features = owner.get_image_features(**pictures, return_dict=True).pooler_output
    return [len(part) for part in features]


def nothing_more(config: Any, inputs: Inputs) -> Inputs:
    """No further tensors."""
    return {}


def no_positions(model: Any, pictures: Inputs) -> list[int]:
    """Images are read by cross-attention, or the model makes room for them itself: no position in the ids."""
    return [0] * len(next(iter(pictures.values())))


def image_run(count: int) -> list[int]:
    """The ids of one image: so many image tokens."""
    return [IMAGE_TOKEN] * count


def build_from_config(family: str, settings: Mapping[str, Any]) -> Any:
    """The model by transformers' own auto classes."""
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **settings))


@dataclass(frozen=True)
class Recipe:
    """How one architecture is built small and shown a picture.

    Attributes:
        config: What its configuration is made of, sub-configurations as dictionaries. Sizes as small as the
            architecture allows, all that is peculiar to it kept: at least two layers of each kind, grouped heads,
            windows, experts, ... .
        pictures: (configuration, number of images, generator) -> the vision tensors, one image per sample; images
            differ in size or tiling where the family allows it.
        counts: (model, vision tensors) -> image positions of each image in the text's sequence.
        ids: Count -> the token ids that stand for one image (image tokens, with marks and separators if any).
        extra: (configuration, all inputs so far) -> the tensors that follow from the ids.
        prefix: What the names of the ids and their mask begin with: "decoder_" where no encoder reads text.
        build: (model type, `config`) -> the model.
        needs: Packages that transformers imports for this architecture and that are not ours.
        why_not: Why there is no miniature, where none can be built; then nothing else counts.
    """

    config: Mapping[str, Any]
    pictures: Callable[[Any, int, Generator], Inputs] = one_picture
    counts: Callable[[Any, Inputs], list[int]] = features_counted
    ids: Callable[[int], list[int]] = image_run
    extra: Callable[[Any, Inputs], Inputs] = nothing_more
    prefix: str = ""
    build: Callable[[str, Mapping[str, Any]], Any] = build_from_config
    needs: tuple[str, ...] = ()
    why_not: str = ""
