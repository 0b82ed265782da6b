"""What training has to know of a family of small models, and what those share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from hooked_mm.scenes.world import Scene
from hooked_mm.small.labels import Labels, part_labels

Pixels = Mapping[str, Tensor]
"""The forward tensors of a batch of pictures of one size, without the text's."""

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_DECODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}


def text_config(tokenizer: Any) -> dict[str, Any]:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return {**_DECODER, **special, "vocab_size": len(tokenizer), "tie_word_embeddings": False}


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


class Steps(NamedTuple):
    """How long each stage of `train` lasts."""

    tower: int = 1500
    alignment: int = 400
    language: int = 1800


class Family(ABC):
    """One family's model, and where its parts are."""

    name: ClassVar[str]
    padded: ClassVar[bool] = False
    """Whether pictures are padded to a square."""
    patch: ClassVar[int]
    """Side of a patch in pixels."""
    axes: ClassVar[int] = 1
    """Of the decoder's rotary positions."""
    steps: ClassVar[Steps] = Steps()
    dtype: ClassVar[str] = "bfloat16"
    """In which a saved model computes unless told otherwise; its weights are stored in bfloat16."""
    tower_batch: ClassVar[int] = 2
    """How many times as many pictures a step shows in the first two stages as in the last."""
    adapted: ClassVar[str] = r"layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    """The decoder's linear layers, as a pattern of their paths in it."""

    @abstractmethod
    def build(self) -> tuple[Any, Any]:
        """A randomly initialised model and its processor."""

    def patch_grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the tower's patches for a picture of this size, taken as it is."""
        return height // self.patch, width // self.patch

    @abstractmethod
    def token_grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the image tokens; each is made responsible for its part of the picture."""

    @abstractmethod
    def patches(self, model: Any, pixels: Pixels) -> Float[Tensor, "b patches d_vision"]:
        """What the connector reads of the tower."""

    def tokens(self, model: Any, pixels: Pixels) -> Float[Tensor, "b tokens d"]:
        """What enters the decoder."""
        return torch.stack(list(model.model.get_image_features(**pixels).pooler_output))

    @abstractmethod
    def decoder(self, model: Any) -> Any:
        """The decoder's stack."""

    def patch_order(self, rows: int, cols: int) -> Int[Tensor, " patches"]:
        """Which cell of the grid, row by row, each patch of the tower is."""
        return torch.arange(rows * cols)

    def pixels(self, processor: Any, picture: Image.Image) -> dict[str, Tensor]:
        """A picture's tensors as a pool keeps them: its own `pixel_values`, and what all pictures of one size share."""
        made = processor.image_processor(images=[picture], return_tensors="pt")
        values = made["pixel_values"]
        # Most processors stand a batch dimension in front; Qwen2-VL's lists patches.
        shared = {name: value for name, value in made.items() if name == "image_grid_thw"}
        return {"pixel_values": values if values.ndim == 2 else values[0], **shared}

    def labels(self, processor: Any, item: Scene, masks: Float[np.ndarray, "objects h w"]) -> tuple[Labels, Labels]:
        """What the tower's patches and the image tokens show, in their orders."""
        grid = self.patch_grid(item.width, item.height)
        patches = part_labels(item, masks, *grid, self.padded)
        order = self.patch_order(*grid)
        tokens = part_labels(item, masks, *self.token_grid(item.width, item.height), self.padded)
        return {name: value[order] for name, value in patches.items()}, tokens

    def tower_width(self, model: Any) -> int:
        """Numbers per patch that the connector reads."""
        vision = model.config.vision_config
        return int(getattr(vision, "embed_dim", None) or vision.hidden_size)

    def image_token(self, model: Any) -> int:
        """The token at whose positions image tokens stand."""
        return int(model.config.image_token_id)

    def with_tokens(
        self, embeds: Float[Tensor, "b p d"], image: Int[Tensor, " tokens"], tokens: Float[Tensor, "b tokens d"]
    ) -> Float[Tensor, "b p d"]:
        """Embeddings with image tokens in them."""
        return embeds.index_copy(1, image, tokens)

    def attention(self, decoder: Any) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Each layer's weights of queries, keys, values and output, to be written into."""
        for layer in decoder.layers:
            own = layer.self_attn
            yield own.q_proj.weight, own.k_proj.weight, own.v_proj.weight, own.o_proj.weight

    def join(self, pixels: Pixels, rows: Any) -> Pixels:
        """The forward tensors of some rows of a pool, whose first dimension is the picture."""
        return {"pixel_values": pixels["pixel_values"][rows].float()}

    def grey(self, values: Float[Tensor, "n *pixels"]) -> Float[Tensor, "n *pixels"]:  # noqa: F821
        """The same pictures without colour; `values` as a pool holds them, channels before height and width."""
        return values.mean(-3, keepdim=True).expand_as(values)

    def settle(self, model: Any, pixels: Pixels) -> None:  # noqa: B027  (most families need nothing)
        """What is put right in a trained model, shown some pictures, without changing what it says."""

    def positions(self, model: Any, inputs: Mapping[str, Tensor]) -> Int[Tensor, "3 p"]:
        """The rotary positions of a prompt of one sample."""
        length = inputs["input_ids"].shape[1]
        return torch.arange(length).expand(3, length)
