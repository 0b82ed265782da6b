"""Training data of the small models: scenes rendered once, questions and captions packed behind one image prefix.

All texts about an image share its prefix (`<s> user : <image>...`): each text attends to the prefix and to itself
alone (block mask) and its positions go on from the prefix, so every text sees exactly what it would see by itself
while the image is encoded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hooked_mm.scenes.draw import render
from hooked_mm.scenes.language import CAPTION_PROMPT, WORD_CLASSES, caption, questions
from hooked_mm.scenes.world import Scene, scene

IGNORE = -100

PATCH_CLASSES = ("shapes", "colours", "sizes", "positions")
"""What an object patch is labelled with; a background patch is labelled with its place."""


@dataclass(frozen=True)
class ScenePool:
    """Scenes with their pictures and per-patch truth.

    `pixels` (n, 3, h, w) uint8; `labels[class]` (n, patches) index into that word class, or IGNORE.
    """

    scenes: list[Scene]
    pixels: Tensor
    labels: dict[str, Tensor]

    def images(self, rows: np.ndarray) -> Float[Tensor, "b 3 h w"]:
        """Normalised as the models' image processors do it (mean .5, standard deviation .5)."""
        return (self.pixels[rows].float() / 255 - 0.5) / 0.5


def _patch_labels(item_scene: Scene, masks: np.ndarray, patch: int) -> dict[str, np.ndarray]:
    count, height, width = masks.shape
    cover = masks.reshape(count, height // patch, patch, width // patch, patch).mean((2, 4)).reshape(count, -1)
    owner = np.where(cover.max(0) > 0.15, cover.argmax(0), -1)
    labels = {}
    for name in PATCH_CLASSES:
        words = [getattr(item, name.removesuffix("s")) for item in item_scene.objects]
        index = np.array([WORD_CLASSES[name].index(word) for word in words] + [IGNORE])
        labels[name] = index[owner]
    place = WORD_CLASSES["places"].index(item_scene.place)
    labels["places"] = np.where(cover.max(0) < 0.02, place, IGNORE)
    labels["object"] = (owner >= 0).astype(np.int64)
    return labels


def make_pool(seed: int, indices: range, patch: int, *, two_objects: float) -> ScenePool:
    """Render scenes `indices` of data set `seed`."""
    scenes = [scene(seed, index, two_objects=two_objects) for index in indices]
    pixels, labels = [], []
    for item in scenes:
        picture, masks = render(item)
        pixels.append(torch.from_numpy(picture).permute(2, 0, 1))
        labels.append(_patch_labels(item, masks, patch))
    stacked = {name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in labels[0]}
    return ScenePool(scenes, torch.stack(pixels), stacked)


@dataclass(frozen=True)
class Packed:
    """A batch of packed sequences, ready for a decoder; `weights` is each target's share in the loss."""

    ids: Int[Tensor, "b p"]
    labels: Int[Tensor, "b p"]
    weights: Float[Tensor, "b p"]
    positions: Int[Tensor, "b p"]
    mask: Bool[Tensor, "b 1 p p"]
    image_slice: slice


class Packer:
    """Turns scenes into `Packed` batches: every question type and the caption behind each image."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_tokens: int, question_weight: float) -> None:
        self.ids = tokenizer.get_vocab()
        self.image_tokens = image_tokens
        self.question_weight = question_weight

    def _encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def _prompt(self, text: str, rng: np.random.Generator) -> list[int]:
        """Now and then without its last punctuation mark, as people type."""
        words = text if rng.random() > 0.15 else text.rstrip(" .?")
        return self._encode(f"{words} assistant :")

    def __call__(self, scenes: list[Scene], rng: np.random.Generator) -> Packed:
        """Positions are those of each text alone; a target's label stands at the position that predicts it."""
        head = self._encode("<s> user :")
        prefix = head + [self.ids["<image>"]] * self.image_tokens
        rows = []
        for item in scenes:
            texts = [(CAPTION_PROMPT, caption(item), 1.0)]
            texts += [(q.text, q.answer, self.question_weight) for q in questions(item, rng)]
            rows.append([(self._prompt(q, rng), self._encode(f"{a} </s>"), w) for q, a, w in texts])
        length = max(len(prefix) + sum(len(q) + len(a) for q, a, _ in row) for row in rows)
        shape = (len(rows), length)
        ids = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        weights = np.zeros(shape, np.float32)
        positions = np.zeros(shape, np.int64)
        segments = np.full(shape, -1, np.int64)
        for row, encoded in enumerate(rows):
            start = len(prefix)
            ids[row, :start], positions[row, :start], segments[row, :start] = prefix, np.arange(start), 0
            for segment, (prompt, answer, weight) in enumerate(encoded, start=1):
                span = slice(start, start + len(prompt) + len(answer))
                ids[row, span] = prompt + answer
                positions[row, span] = len(prefix) + np.arange(len(prompt) + len(answer))
                segments[row, span] = segment
                targets = slice(start + len(prompt) - 1, span.stop - 1)
                labels[row, targets] = answer
                weights[row, targets] = weight
                start = span.stop
        same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        causal = np.tril(np.ones((length, length), bool))
        # A padded query still attends to itself: a row of the mask that is empty would make softmax undefined.
        mask = (same & causal) | np.eye(length, dtype=bool)
        return Packed(
            ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(weights),
            positions=torch.from_numpy(positions),
            mask=torch.from_numpy(mask[:, None]),
            image_slice=slice(len(head), len(prefix)),
        )
