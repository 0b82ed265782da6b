"""Molmo's pictures: cut into overlapping crops beside the whole made small; where each pooled patch belongs.

The picture is scaled to fill a grid of at most `max_crops` windows with a margin around them, padded to that size, and
cut into crops that overlap by both margins. The outer margin of a crop is dropped where another crop shows it better.
Facts: the training repository allenai/molmo (olmo/data/model_preprocessor.py), whose resizing in torch is taken; the
published remote code resizes with TensorFlow, which gives the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from hooked_mm.errors import BadInputError


@dataclass(frozen=True)
class Crops:
    """One picture as Molmo sees it.

    Attributes:
        pixels: (crops, patches, pixels) float32, the whole picture first; a patch's pixels by row, column, channel.
        masks: (crops, patches) float32, see `MolmoImageProcessor.masks`.
        order: (crops, tokens) int64, the how-manieth image token of the picture each pooled patch is; -1 for none.
        rows: Rows of tokens of the stitched crops.
        cols: Columns of them.
    """

    pixels: Float[Tensor, "crops patches pixels"]
    masks: Float[Tensor, "crops patches"]
    order: Int[Tensor, "crops tokens"]
    rows: int
    cols: int


def choose_tiling(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """How many windows (down, across) a picture is cut into.

    Args:
        height: Pixels of the picture without the margins; may be negative.
        width: The same across.
        window: Side of a window in pixels.
        most: At most so many windows.

    Returns:
        The tiling that needs the least enlarging; where all would shrink the picture, the one that shrinks it least.
        Of equals the one with fewer windows, then with fewer rows.
    """
    tilings = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1)]
    tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
    # In float32, as in training: which of two near ones is chosen is decided by rounding.
    sizes = np.array(tilings, dtype=np.float32) * np.float32(window)
    with np.errstate(divide="ignore"):
        scale = (sizes / np.array([height, width], dtype=np.float32)).min(axis=1)
    best = scale.argmax() if (scale < 1).all() else np.where(scale < 1, np.float32(10e9), scale).argmin()
    return tilings[int(best)]


def resize_and_pad(
    pixels: Float[Tensor, "c h w"], height: int, width: int
) -> tuple[Float[Tensor, "c height width"], Float[Tensor, "height width"]]:
    """The picture as large as fits, centred on black, and 1 where it is; bilinear with anti-aliasing.

    Raises:
        BadInputError: If the picture is so narrow that nothing is left of it.
    """
    # The scale and the sizes in float32, as in training: rounding decides about a row more or less.
    own = np.array(pixels.shape[1:], dtype=np.float32)
    scale = (np.array([height, width], dtype=np.float32) / own).min()
    rows, cols = (int(side) for side in own * scale)
    if not rows or not cols:
        raise BadInputError(
            f"a picture of {pixels.shape[2]} x {pixels.shape[1]} pixels is too narrow: scaled to fit {width} x "
            f"{height}, nothing is left of one side; crop it, or pad it to another shape"
        )
    small = torch.nn.functional.interpolate(
        pixels[None], size=(rows, cols), mode="bilinear", align_corners=False, antialias=True
    )[0].clamp(0, 1)
    top, left = (height - rows) // 2, (width - cols) // 2
    whole, mask = pixels.new_zeros(len(pixels), height, width), pixels.new_zeros(height, width)
    whole[:, top : top + rows, left : left + cols] = small
    mask[top : top + rows, left : left + cols] = 1
    return whole, mask


class MolmoImageProcessor(ImageProcessingMixin):
    """Cuts pictures into crops; the settings are the published file's.

    Args:
        max_crops: At most so many crops beside the whole picture.
        overlap_margins: Patches that a crop gives up on its left and top, and on its right and bottom.
        base_image_input_size: Height and width of a crop in pixels.
        image_token_length_w: Tokens in a row of a crop, each of 2 x 2 patches.
        image_token_length_h: Rows of them.
        image_patch_size: Side of a patch in pixels.
        image_mean: Of each channel, subtracted.
        image_std: Of each channel, divided by.
        options: Everything else that the file says (`do_normalize`, `image_padding_mask`, ...).

    Raises:
        BadInputError: If the settings do not fit each other.
    """

    model_input_names = ("images", "image_masks", "image_input_idx")

    def __init__(
        self,
        max_crops: int = 12,
        overlap_margins: Sequence[int] = (4, 4),
        base_image_input_size: Sequence[int] = (336, 336),
        image_token_length_w: int = 12,
        image_token_length_h: int = 12,
        image_patch_size: int = 14,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        options = {name: value for name, value in options.items() if name != "auto_map"}
        super().__init__(**{"do_normalize": True, "image_padding_mask": True, **options})
        self.max_crops, self.overlap_margins = max_crops, list(overlap_margins)
        self.base_image_input_size = list(base_image_input_size)
        self.image_token_length_w, self.image_token_length_h = image_token_length_w, image_token_length_h
        self.image_patch_size = image_patch_size
        self.image_mean = list(OPENAI_CLIP_MEAN if image_mean is None else image_mean)
        self.image_std = list(OPENAI_CLIP_STD if image_std is None else image_std)
        side = 2 * image_patch_size * image_token_length_w
        if self.base_image_input_size != [side, side] or image_token_length_h != image_token_length_w:
            raise BadInputError(
                f"crops of {self.base_image_input_size} pixels do not hold {image_token_length_h} x "
                f"{image_token_length_w} tokens of 2 x 2 patches of {image_patch_size} pixels; they must be square"
            )
        if any(margin % 2 or margin < 0 for margin in self.overlap_margins) or self.window < 2:
            raise BadInputError(
                f"overlap_margins={self.overlap_margins} must be even, as patches are pooled two by two, and leave "
                f"some of a crop's {self.side} patches"
            )

    @property
    def side(self) -> int:
        """Patches in a row of a crop."""
        return int(self.base_image_input_size[0]) // int(self.image_patch_size)

    @property
    def window(self) -> int:
        """Patches in a row of a window: of a crop without its margins."""
        return self.side - sum(self.overlap_margins)

    def cut(self, picture: Image.Image) -> Crops:
        """The crops of one RGB picture."""
        values = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
        views, shown, rows, cols = self.views(values)
        margin = sum(self.overlap_margins)
        return Crops(
            pixels=self._patches(self._normalised(views)),
            masks=self.masks(shown[1:]),
            order=self.order(rows, cols),
            rows=(rows * self.window + margin) // 2,
            cols=(cols * self.window + margin) // 2,
        )

    def views(
        self, values: Float[Tensor, "c h w"]
    ) -> tuple[Float[Tensor, "crops c side side"], Float[Tensor, "crops side side"], int, int]:
        """The whole made small, then the crops, of any channels between 0 and 1; 1 where a view shows the picture and
        not padding; how many crops there are down and across."""
        patch, margin = int(self.image_patch_size), sum(self.overlap_margins)
        edge, step, size = margin * patch, self.window * patch, self.side * patch
        height, width = values.shape[1:]
        rows, cols = choose_tiling(height - edge, width - edge, step, int(self.max_crops))
        large, mask = resize_and_pad(values, rows * step + edge, cols * step + edge)
        whole, seen = resize_and_pad(values, size, size)
        corners = [(i * step, j * step) for i in range(rows) for j in range(cols)]
        views = torch.stack([whole, *(large[:, y : y + size, x : x + size] for y, x in corners)])
        shown = torch.stack([seen, *(mask[y : y + size, x : x + size] for y, x in corners)])
        return views, shown, rows, cols

    def _normalised(self, values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (self.image_mean, self.image_std))
        return (values - mean) / std

    def _patches(self, values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n patches pixels"]:
        """Patches row by row, the pixels of each by row, column and channel."""
        patch, side = self.image_patch_size, self.side
        split = values.unflatten(3, (side, patch)).unflatten(2, (side, patch))
        return split.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def masks(self, shown: Float[Tensor, "n h w"]) -> Float[Tensor, "n+1 patches"]:
        """Which part of each patch is picture, of the crops; then a row of -1.

        The whole picture stands *before* the crops and its row behind them, so that every crop gets its successor's:
        the released weights were trained with that.
        """
        parts = torch.nn.functional.avg_pool2d(shown[:, None], int(self.image_patch_size)).flatten(1)
        return torch.cat([parts, -torch.ones_like(parts[:1])])

    def order(self, rows: int, cols: int) -> Int[Tensor, "crops tokens"]:
        """The how-manieth image token each pooled patch of each crop is, the whole picture's first; -1 for none."""
        side, step = self.side // 2, self.window // 2
        before, after = (margin // 2 for margin in self.overlap_margins)
        wide = cols * step + before + after
        place = torch.arange(side)
        found = [torch.arange(side * side).view(side, side)]
        for i in range(rows):
            for j in range(cols):
                kept = [
                    (place >= (before if index else 0)) & (place < (side if index == last - 1 else side - after))
                    for index, last in ((i, rows), (j, cols))
                ]
                token = side * side + (place[:, None] + i * step) * wide + place + j * step
                found.append(torch.where(kept[0][:, None] & kept[1], token, -1))
        return torch.stack(found).flatten(1)
