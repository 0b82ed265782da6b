"""Molmo-7B-D-0924 once more, as plain functions in float64: what the port is compared with.

Written from the published facts, unlike the original in structure: no modules, no cache, no padding (each example runs
alone), crops by their absolute place in the stitched picture. Sources: the training repository allenai/molmo
(`olmo/model.py`, `olmo/image_vit.py`, `olmo/data/model_preprocessor.py`, `olmo/hf_molmo.py`) and the remote code
published with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# OpenAI's CLIP; `image_mean` and `image_std` of the published preprocessor_config.json.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Sizes:
    """All the sizes of a Molmo; the defaults are a miniature, `MOLMO_7B_D` is the published one."""

    hidden: int = 48
    fused_mlp: int = 80  # `intermediate_size`: width of `ff_proj`, twice what the activation leaves
    layers: int = 2
    heads: int = 6
    kv_heads: int = 2
    embedding: int = 320
    extra: int = 128  # `new_embedding`; the unembedding does not cover them
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    max_positions: int = 4096
    tower_hidden: int = 32
    tower_heads: int = 4
    tower_mlp: int = 64
    # CLIP has 24 blocks, of which 23 were kept (hf_molmo.py:71). `tower_taken` counts from the end of the list of their
    # outputs, in which the embeddings are not: the 22nd block's output comes first, then the 15th's; the 23rd runs for
    # nothing.
    tower_blocks: int = 10
    tower_taken: tuple[int, ...] = (-2, -9)
    tower_eps: float = 1e-5
    patch: int = 4
    side: int = 48  # a crop, in pixels
    margins: tuple[int, int] = (4, 4)  # (left and top, right and bottom), in patches
    max_crops: int = 12  # without the overview

    @property
    def across(self) -> int:
        """Patches along a side of a crop."""
        return self.side // self.patch

    @property
    def cells(self) -> int:
        """Tokens along a side of a crop: patches are pooled 2 x 2."""
        return (self.across + 1) // 2


MOLMO_7B_D = Sizes(
    hidden=3584, fused_mlp=37888, layers=28, heads=28, kv_heads=4, embedding=152064, tower_hidden=1024, tower_heads=16,
    tower_mlp=4096, tower_blocks=23, patch=14, side=336,
)  # fmt: skip


@dataclass(frozen=True)
class ImageIds:
    """Token ids of `<im_start>`, `<im_end>`, `<im_patch>`, `<im_col>`."""

    start: int
    end: int
    patch: int
    col: int


@dataclass(frozen=True)
class Cropped:
    """One picture as the model sees it.

    Attributes:
        crops: (n, patches, 3 * patch * patch) normalised pixels, the overview first; within a patch row, column,
        channel masks: (n, patches) share of each patch that is picture, as the original assigns it (see `cropped`)
        tokens: (length,) ids that stand for the picture places: (n, cells * cells) where in `tokens` a pooled cell is
        added; negative: nowhere
    """

    crops: np.ndarray
    masks: np.ndarray
    tokens: np.ndarray
    places: np.ndarray


def best_tiling(height: float, width: float, window: int, most: int) -> tuple[int, int]:
    """(rows, columns) of crops for a picture of that size less the margins (model_preprocessor.py:176-207).

    The tiling that enlarges least, or, where all would shrink the picture, that shrinks least; of equals the one with
    fewer crops, then fewer rows. Quotients are float32. Sizes may be 0 (infinite enlargement) or negative (counts as
    shrinking).
    """
    by_crops = sorted((rows * cols, rows, cols) for rows in range(1, most + 1) for cols in range(1, most // rows + 1))
    enlarging, shrinking = (math.inf, (0, 0)), (-math.inf, (0, 0))
    for _, rows, cols in by_crops:
        with np.errstate(divide="ignore"):
            tall = np.float32(rows * window) / np.float32(height)
            wide = np.float32(cols * window) / np.float32(width)
        scale = float(min(tall, wide))
        if scale >= 1 and (scale < enlarging[0] or enlarging[1] == (0, 0)):
            enlarging = scale, (rows, cols)
        if scale < 1 and scale > shrinking[0]:
            shrinking = scale, (rows, cols)
    return shrinking[1] if enlarging[1] == (0, 0) else enlarging[1]


def triangle(before: int, after: int) -> np.ndarray:
    """(after, before) weights of antialiased bilinear resizing: triangles as wide as the coarser grid, of sum 1."""
    ratio = before / after
    reach = max(ratio, 1.0)
    centre = (np.arange(after)[:, None] + 0.5) * ratio
    weights = np.clip(1 - np.abs(np.arange(before)[None, :] + 0.5 - centre) / reach, 0, None)
    return weights / weights.sum(1, keepdims=True)


def fitted(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture fitted into (height, width), centred on black, normalised; and where it is.

    Source: model_preprocessor.py:60-135.

    Black is 0 before normalising, so the border is -mean / std. The sizes are float32 products cut to integers: in
    float64 some come out one larger.
    """
    old_height, old_width = np.float32(image.shape[0]), np.float32(image.shape[1])
    scale = min(np.float32(height) / old_height, np.float32(width) / old_width)
    rows, cols = int(old_height * scale), int(old_width * scale)
    pixels = np.einsum(
        "ya,xb,abc->yxc", triangle(len(image), rows), triangle(image.shape[1], cols), image / 255.0, optimize=True
    )
    top, left = (height - rows) // 2, (width - cols) // 2
    canvas, there = np.zeros((height, width, 3)), np.zeros((height, width), bool)
    canvas[top : top + rows, left : left + cols] = pixels.clip(0, 1)
    there[top : top + rows, left : left + cols] = True
    return (canvas - np.array(MEAN)) / np.array(STD), there


def in_patches(pixels: np.ndarray, patch: int) -> np.ndarray:
    """(side, side, ...) to (patches, values of a patch), row by row."""
    starts = range(0, len(pixels), patch)
    return np.stack([pixels[y : y + patch, x : x + patch].reshape(-1) for y in starts for x in starts])


def cropped(image: np.ndarray, sizes: Sizes, ids: ImageIds) -> Cropped:
    """(height, width, 3) uint8 to the crops, masks, tokens and places of one picture (model_preprocessor.py:341-640).

    High-resolution crops overlap by both margins; of a patch that two crops hold, the one counts in which it is not
    margin. A cell's token follows from its row and column in the whole picture.

    The masks are one place off, and the released weights were trained with it: a row of -1 was appended behind the
    masks of the high-resolution crops, while the overview was put before them (`fix_image_padding=False`,
    hf_molmo.py:58). So the overview has the mask of the first crop, each crop that of the next, and the last one -1
    throughout, which counts as partly padded.
    """
    before, behind = sizes.margins
    window = sizes.across - before - behind
    margin = (before + behind) * sizes.patch
    if window % 2 or before % 2 or behind % 2:
        raise ValueError("a cell must not lie across the border of two windows")
    tiling = best_tiling(image.shape[0] - margin, image.shape[1] - margin, window * sizes.patch, sizes.max_crops)
    whole, there = fitted(image, *(count * window * sizes.patch + margin for count in tiling))
    overview, _ = fitted(image, sizes.side, sizes.side)

    tall, wide = ((count * window + before + behind) // 2 for count in tiling)
    overview_row, row = [ids.patch] * sizes.cells + [ids.col], [ids.patch] * wide + [ids.col]
    first = [ids.start, *overview_row * sizes.cells, ids.end]
    tokens = [*first, ids.start, *row * tall, ids.end]

    crops, masks = [in_patches(overview, sizes.patch)], []
    places = [[1 + y * len(overview_row) + x for y in range(sizes.cells) for x in range(sizes.cells)]]
    for down, along in np.ndindex(*tiling):
        y0, x0 = down * window * sizes.patch, along * window * sizes.patch
        cut = np.s_[y0 : y0 + sizes.side, x0 : x0 + sizes.side]
        crops.append(in_patches(whole[cut], sizes.patch))
        masks.append(in_patches(there[cut], sizes.patch).mean(1))
        place = np.full((sizes.cells, sizes.cells), -100)
        for y, x in np.ndindex(place.shape):
            kept = all(
                (crop == 0 or 2 * cell >= before) and (crop == count - 1 or 2 * cell < sizes.across - behind)
                for crop, cell, count in ((down, y, tiling[0]), (along, x, tiling[1]))
            )
            if kept:
                place[y, x] = len(first) + 1 + (down * window // 2 + y) * len(row) + along * window // 2 + x
        places.append(place.reshape(-1).tolist())
    masks.append(np.full(sizes.across**2, -1.0))
    return Cropped(np.stack(crops), np.stack(masks), np.array(tokens), np.array(places))


@dataclass(frozen=True)
class Example:
    """One prompt: `tokens`, and of its pictures, one after the other, `crops`, `masks` and `places` (in `tokens`)."""

    tokens: list[int]
    crops: np.ndarray
    masks: np.ndarray
    places: np.ndarray


def example(pictures: Sequence[np.ndarray], prompt: Sequence[int], bos: int, sizes: Sizes, ids: ImageIds) -> Example:
    """[BOS] pictures, prompt.

    BOS is the tokenizer's EOS (`<|endoftext|>`), Qwen2 having none. The original gives every picture the places of the
    first (an error: it was trained on one); here each is moved by what stands before it. For text alone the published
    processor fails and the training repository forgets the BOS; here it stands, as with pictures.
    """
    parts = [cropped(picture, sizes, ids) for picture in pictures]
    tokens, places = [bos], []
    for part in parts:
        places.append(np.where(part.places < 0, -100, part.places + len(tokens)))
        tokens += part.tokens.tolist()
    nothing = np.zeros((0, sizes.across**2, 3 * sizes.patch**2))
    return Example(
        [*tokens, *prompt],
        np.concatenate([nothing, *(part.crops for part in parts)]),
        np.concatenate([nothing[:, :, 0], *(part.masks for part in parts)]),
        np.concatenate([np.zeros((0, sizes.cells**2), int), *places]),
    )


class Weights:
    """A state dict read in float64, below one prefix."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str = "model") -> None:
        self.state, self.prefix = state, prefix

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self.state[f"{self.prefix}.{name}"].double()

    def below(self, name: str) -> Weights:
        """What lies deeper."""
        return Weights(self.state, f"{self.prefix}.{name}")

    def linear(self, name: str, x: Tensor, bias: bool = True) -> Tensor:
        """x @ weight.T (+ bias)."""
        y = x @ self(f"{name}.weight").T
        return y + self(f"{name}.bias") if bias else y

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        """Layer norm with weight and bias."""
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return centred / scale * self(f"{name}.weight") + self(f"{name}.bias")

    def rms(self, name: str, x: Tensor, eps: float) -> Tensor:
        """Root mean square norm: weight, no bias."""
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self(f"{name}.weight")


def attended(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """(..., queries, heads, size) and (..., keys, heads, size): softmax(q k / sqrt(size)) v, heads side by side."""
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v).flatten(-2)


def tower(weights: Weights, crops: Tensor, sizes: Sizes) -> list[Tensor]:
    """(n, patches, pixels) to the outputs of all blocks, each (n, 1 + patches, hidden) (image_vit.py).

    The class token stands first; positions are added to all, then comes a norm; blocks are pre-norm; the activation is
    x * sigmoid(1.702 x). There is no norm at the end.
    """

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (sizes.tower_heads, -1))

    patches = weights.linear("patch_embedding", crops, bias=False)
    x = torch.cat([weights("class_embedding").expand(len(crops), 1, -1), patches], 1) + weights("positional_embedding")
    x = weights.norm("pre_ln", x, sizes.tower_eps)
    outputs = []
    for index in range(sizes.tower_blocks):
        block = weights.below(f"transformer.resblocks.{index}")
        y = block.norm("attention_norm", x, sizes.tower_eps)
        heads = attended(*(split(block.linear(f"attention.{name}", y)) for name in ("wq", "wk", "wv")))
        x = x + block.linear("attention.wo", heads)
        y = block.linear("feed_forward.w1", block.norm("ffn_norm", x, sizes.tower_eps))
        x = x + block.linear("feed_forward.w2", y * torch.sigmoid(1.702 * y))
        outputs.append(x)
    return outputs


def image_features(state: Mapping[str, Tensor], crops: Tensor, masks: Tensor, sizes: Sizes) -> Tensor:
    """(n, patches, pixels), (n, patches) to (n, cells * cells, hidden): from pixels to the decoder.

    Tower, padding embeddings, pooling, projector (model.py:1474-1583).

    A crop that is -1 throughout is batch padding: its features are zero. Then patches that hold no picture (mask 0) get
    one learned vector, those that hold some, or whose mask is -1, another. Of 2 x 2 patches the mean asks and the four
    answer; nothing is added to the answer but the bias.
    """
    weights = Weights(state).below("vision_backbone")
    outputs = tower(weights.below("image_vit"), crops, sizes)
    x = torch.cat([outputs[index] for index in sizes.tower_taken], -1)[:, 1:]
    x = x * (crops != -1).flatten(1).any(1)[:, None, None]
    pad = weights("pad_embed")
    x = x + pad[0] * (masks == 0)[..., None] + pad[1] * ((masks != 0) & (masks < 1))[..., None]

    grid = x.unflatten(1, (sizes.across, sizes.across))
    if sizes.across % 2:
        grid = torch.nn.functional.pad(grid, (0, 0, 0, 1, 0, 1))
    four = torch.stack([grid[:, y::2, x::2] for y in (0, 1) for x in (0, 1)], -2).flatten(1, 2)
    pool = weights.below("image_pooling_2d")
    q, k, v = (
        pool.linear(name, y).unflatten(-1, (sizes.tower_heads, -1))
        for name, y in (("wq", four.mean(-2, keepdim=True)), ("wk", four), ("wv", four))
    )
    pooled = pool.linear("wo", attended(q, k, v)).squeeze(-2)
    project = weights.below("image_projector")
    gate = project.linear("w1", pooled, bias=False)
    return project.linear("w2", gate * torch.sigmoid(gate) * project.linear("w3", pooled, bias=False), bias=False)


def rotated(x: Tensor, theta: float) -> Tensor:
    """(length, heads, size), rotated by position: the first half of a head is paired with the second ("llama")."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.polar(torch.ones_like(angle), angle)[:, None] * torch.complex(x[..., :half], x[..., half:])
    return torch.cat([turned.real, turned.imag], -1)


def embedded(state: Mapping[str, Tensor], one: Example, sizes: Sizes) -> Tensor:
    """(length, hidden): the rows of both tables, features of pictures *added* where their tokens stand."""
    weights = Weights(state).below("transformer.wte")
    x = torch.cat([weights("embedding"), weights("new_embedding")])[torch.tensor(one.tokens)]
    if len(one.crops):
        features = image_features(state, torch.tensor(one.crops), torch.tensor(one.masks), sizes)
        there = torch.tensor(one.places >= 0)
        x[torch.tensor(one.places)[there]] += features[there]
    return x


def logits(state: Mapping[str, Tensor], one: Example, sizes: Sizes) -> Tensor:
    """(length, embedding) of one prompt alone, positions from 0 (model.py:937-1055, 1801-2047).

    The fused MLP holds (value, gate): the activation acts on its second half.
    """
    weights, length, size = Weights(state).below("transformer"), len(one.tokens), sizes.hidden // sizes.heads
    x = embedded(state, one, sizes)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for index in range(sizes.layers):
        block = weights.below(f"blocks.{index}")
        fused = block.linear("att_proj", block.rms("attn_norm", x, sizes.rms_eps)).unflatten(-1, (-1, size))
        q, k, v = fused.split([sizes.heads, sizes.kv_heads, sizes.kv_heads], 1)
        owner = torch.arange(sizes.heads) // (sizes.heads // sizes.kv_heads)
        heads = attended(rotated(q, sizes.rope_theta), rotated(k, sizes.rope_theta)[:, owner], v[:, owner], causal)
        x = x + block.linear("attn_out", heads, bias=False)
        value, gate = block.linear("ff_proj", block.rms("ff_norm", x, sizes.rms_eps), bias=False).chunk(2, -1)
        x = x + block.linear("ff_out", gate * torch.sigmoid(gate) * value, bias=False)
    return weights.linear("ff_out", weights.rms("ln_f", x, sizes.rms_eps), bias=False)


def greedy(state: Mapping[str, Tensor], one: Example, sizes: Sizes, steps: int) -> list[int]:
    """The ids that follow, each the most likely, everything computed anew at each."""
    new: list[int] = []
    for _ in range(steps):
        now = Example([*one.tokens, *new], one.crops, one.masks, one.places)
        new.append(int(logits(state, now, sizes)[-1].argmax()))
    return new
