"""Samples for pages of the lens: one whose texts are all evil, and one as large as they come."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from analyses.lens_page import LensSample, View
from analyses.logit_lens import Cells, Lens

EVIL = [
    "</script><img src=x onerror=window.ran=1>",
    "<img src=x onerror=window.ran=1>",
    "<!--<script>window.ran=1</script>",
    "&lt;b&gt;\u2028\u2029 {{ 7*7 }}",
    "\"'><svg onload=window.ran=1>",
]
WORDS = [*EVIL, " red", "blue", " star", "\n", " "]


def made_lens(ids: Tensor, seed: int = 0) -> Lens:
    """Words at (layers, n, k) with falling random probabilities."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(ids.shape, generator=generator).sort(dim=-1, descending=True).values / ids.shape[-1]
    cells = Cells(ids, shares, torch.rand(ids.shape[:2], generator=generator) * math.log(10))
    names = {layer: f"blocks.{layer}.hook_resid_post" for layer in range(len(ids))}
    return Lens(names, torch.arange(ids.shape[1]), cells, None)


def made_sample(rows: int = 40, layers: int = 4, seed: int = 0) -> LensSample:
    """Two by three patches at tokens 5 to 10, over the left half of a picture; the words are evil."""
    ids = torch.randint(0, len(WORDS), (layers, rows, 5), generator=torch.Generator().manual_seed(seed))
    kinds = ["image" if 5 <= n < 11 else "question" if n < 30 else "answer" for n in range(rows)]
    grid = torch.tensor([[5, 6, 7], [8, 9, -1]])
    return LensSample(
        EVIL[0],
        made_lens(ids, seed),
        [WORDS[n % len(WORDS)] for n in range(rows)],
        kinds,
        WORDS.__getitem__,
        len(WORDS),
        [Image.new("RGB", (60, 40), (90, 120, 60))],
        [View(0, EVIL[1], grid, (0.0, 0.0, 0.5, 1.0))],
        EVIL[2],
        EVIL[4],
        [(EVIL[0], EVIL[3])],
    )


def large_sample() -> LensSample:
    """2,900 tokens, 52 x 54 patches, 29 layers, five words of 150,000 without any order: more is hard to make."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = random.integers(2, 11, 150_000)
    words = [" " * (n % 2) + "".join(letters[random.integers(0, 26, length)]) for n, length in enumerate(lengths)]
    y, x = np.mgrid[0:1456, 0:1512]
    waves = [np.sin(x / 37 + y / 91), np.sin(x / 61 - y / 23), np.cos(y / 53)]
    pixels = 128 + 90 * np.stack(waves, -1) + random.normal(0, 12, (1456, 1512, 3))
    return LensSample(
        "a large picture",
        made_lens(torch.from_numpy(random.integers(0, 150_000, (29, 2900, 5)))),
        ["<|image_pad|>" if 20 <= n < 2828 else words[n] for n in range(2900)],
        ["image" if 20 <= n < 2828 else "question" for n in range(2900)],
        words.__getitem__,
        150_000,
        [Image.fromarray(pixels.clip(0, 255).astype(np.uint8))],
        [View(0, "picture", torch.arange(52 * 54).reshape(52, 54) + 20)],
    )
