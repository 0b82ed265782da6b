"""The small Molmo: pictures cut into overlapping crops of 48 px beside the whole, made as small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hooked_mm.molmo import MolmoConfig, MolmoForCausalLM, MolmoImageProcessor, MolmoProcessor
from hooked_mm.molmo.processing_molmo import COLUMN, END, PATCH, PICTURE, START
from hooked_mm.scenes.world import Scene
from hooked_mm.small.family import HALF, Family, Pixels, Steps, text_config
from hooked_mm.small.labels import IGNORE, Labels, label_cells
from hooked_mm.small.tokenizer import build_tokenizer


class Molmo(Family):
    """CLIP-like tower, pooling attention and gated MLP, added to the embeddings; a decoder of Molmo's own plan."""

    name = "molmo"
    side, patch, width = 48, 4, 80
    # A picture goes through the tower as two to five crops.
    tower_batch = 1
    # A caption's words are spread over more image tokens, and copied later, than the other families' are.
    steps = Steps(language=3000)
    # Scores of the pooling attention, before which nothing is normalised, reach a thousand: with queries and keys
    # rounded to bfloat16, another of the four patches wins.
    dtype = "float32"
    adapted = r"blocks\.\d+\.(att_proj|attn_out|ff_proj|ff_out)"

    def build(self) -> tuple[Any, Any]:
        tokenizer = build_tokenizer([START, END, PATCH, COLUMN, PICTURE], behind=True)
        text = text_config(tokenizer)
        added = 5
        config = MolmoConfig(
            **{
                **text,
                "vocab_size": text["vocab_size"] - added,
                "intermediate_size": 2 * text["intermediate_size"],
                "rope_theta": 10_000.0,
            },
            additional_vocab_size=added,
            vision_config={
                "hidden_size": self.width,
                "intermediate_size": 4 * self.width,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": self.side,
                "patch_size": self.patch,
            },
            vision_feature_layer=(-1, -3),
            image_patch_id=tokenizer.convert_tokens_to_ids(PATCH),
        )
        return MolmoForCausalLM(config), MolmoProcessor(self._images(), tokenizer)

    def _images(self) -> MolmoImageProcessor:
        tokens = self.side // self.patch // 2
        return MolmoImageProcessor(
            max_crops=4,
            overlap_margins=(2, 2),
            base_image_input_size=(self.side, self.side),
            image_token_length_w=tokens,
            image_token_length_h=tokens,
            image_patch_size=self.patch,
            **HALF,
        )

    def token_grid(self, width: int, height: int) -> tuple[int, int]:
        cut = self._images().cut(Image.new("RGB", (width, height)))
        return cut.rows, cut.cols

    def pixels(self, processor: Any, picture: Image.Image) -> dict[str, Tensor]:
        cut = processor.image_processor.cut(picture)
        return {"pixel_values": cut.pixels, "masks": cut.masks, "order": cut.order}

    def join(self, pixels: Pixels, rows: Any) -> Pixels:
        return {**pixels, "pixel_values": pixels["pixel_values"][rows].float()}

    def grey(self, values: Float[Tensor, "n *pixels"]) -> Float[Tensor, "n *pixels"]:  # noqa: F821
        # A patch is a row of (height, width, channel).
        channels = values.unflatten(-1, (-1, 3))
        return channels.mean(-1, keepdim=True).expand_as(channels).flatten(-2)

    def labels(self, processor: Any, item: Scene, masks: Float[np.ndarray, "objects h w"]) -> tuple[Labels, Labels]:
        # Masks are cut as the picture is: what a patch shows is what its part of them says.
        images = processor.image_processor
        cover, shown, rows, cols = images.views(torch.from_numpy(masks).float())
        found = []
        for size in (self.patch, 2 * self.patch):
            cells = F.avg_pool2d(cover, size).flatten(2).transpose(0, 1).flatten(1)
            labels = label_cells(item, cells, F.avg_pool2d(shown[:, None], size).flatten())
            # A crop does not show where it lies in the picture.
            labels["positions"][(self.side // size) ** 2 :] = IGNORE
            found.append(labels)
        order = images.order(rows, cols).flatten()
        first = torch.empty(int(order.max()) + 1, dtype=torch.long)
        first[order[order >= 0]] = (order >= 0).nonzero()[:, 0]
        return found[0], {name: value[first] for name, value in found[1].items()}

    def tower_width(self, model: Any) -> int:
        return self.width * len(model.config.vision_feature_layer)

    def patches(self, model: Any, pixels: Pixels) -> Float[Tensor, "b patches d_vision"]:
        crops = pixels["pixel_values"]
        seen = model.model.vision_backbone.image_vit(crops.flatten(0, 1))
        both = torch.cat([seen[layer][:, 1:] for layer in model.config.vision_feature_layer], dim=-1)
        return both.view(len(crops), -1, both.shape[-1])

    def tokens(self, model: Any, pixels: Pixels) -> Float[Tensor, "b tokens d"]:
        crops, order = pixels["pixel_values"], pixels["order"].flatten()
        masks = pixels["masks"].repeat(len(crops), 1)
        found = model.model.vision_backbone(crops.flatten(0, 1), masks)
        found = found.view(len(crops), -1, found.shape[-1])[:, order >= 0]
        return found[:, order[order >= 0].argsort()]

    def image_token(self, model: Any) -> int:
        return int(model.config.image_patch_id)

    def with_tokens(
        self, embeds: Float[Tensor, "b p d"], image: Int[Tensor, " tokens"], tokens: Float[Tensor, "b tokens d"]
    ) -> Float[Tensor, "b p d"]:
        return embeds.index_add(1, image, tokens)

    def settle(self, model: Any, pixels: Pixels) -> None:
        """Halve the connector's output until image tokens are at most 256 long on average.

        Two projections are multiplied there and no norm follows, so training lets it grow to a hundred times what the
        decoder adds; every norm of the decoder divides by it, so that its answers stay.
        """
        with torch.no_grad():
            length = float(self.tokens(model, pixels).norm(dim=-1).mean())
            model.model.vision_backbone.image_projector.w2.weight /= 2 ** max(0, math.ceil(math.log2(length / 256)))

    def decoder(self, model: Any) -> Any:
        return model.model.transformer

    def attention(self, decoder: Any) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        for block in decoder.blocks:
            q, k, v = block.att_proj.weight.split(block.fused)
            yield q, k, v, block.attn_out.weight
