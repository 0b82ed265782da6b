"""Texts about an image packed behind it: captions in several styles and questions of every type, in one sequence.

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

from hooked_mm.scenes.captions import STYLES, phrases, wording
from hooked_mm.scenes.questions import questions
from hooked_mm.scenes.world import HELD_OUT, HELD_OUT_SHAPE, Scene, SceneObject
from hooked_mm.small.labels import IGNORE


@dataclass(frozen=True)
class Packed:
    """A batch of packed sequences, ready for a decoder.

    Attributes:
        ids: The prefix with its image tokens, then the texts; padded behind.
        labels: What each position should predict, or IGNORE.
        banned: The token that is left out of a position's softmax (the held-out partner), or IGNORE.
        weights: Each target's share in the loss.
        positions: Rotary positions in three axes; equal but for multimodal rotary embeddings.
        mask: Who attends to whom.
        image: Where the image tokens stand, the same in every row.
    """

    ids: Int[Tensor, "b p"]
    labels: Int[Tensor, "b p"]
    banned: Int[Tensor, "b p"]
    weights: Float[Tensor, "b p"]
    positions: Int[Tensor, "3 b p"]
    mask: Bool[Tensor, "b 1 p p"]
    image: Int[Tensor, " tokens"]


@dataclass(frozen=True)
class _Text:
    prompt: list[int]
    answer: list[int]
    banned: list[int]
    weight: float


class Packer:
    """Turns scenes of one canvas into `Packed` batches.

    Args:
        tokenizer: The small models'.
        image_token: Id of the image token.
        question_weight: How much a question's answer counts against a word of a caption.
        styled: How many styles are asked for per scene, besides the default prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, image_token: int, question_weight: float = 3.0, styled: int = 1
    ) -> None:
        self.ids = tokenizer.get_vocab()
        self.image_token = image_token
        self.question_weight, self.styled = question_weight, styled

    def _encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def _prompt(self, text: str, rng: np.random.Generator) -> list[int]:
        """Now and then without its last punctuation mark, as people type."""
        words = text if rng.random() > 0.15 else text.rstrip(" .?")
        return self._encode(f"{words} assistant :")

    def _banned(self, word: str, item: SceneObject | None) -> int:
        if item is None:
            return IGNORE
        partner = {item.shape: HELD_OUT_SHAPE.get(item.colour), item.colour: HELD_OUT.get(item.shape)}.get(word)
        # On a held-out scene the partner is the answer itself.
        return IGNORE if partner is None or partner == word else self.ids[partner]

    def _text(
        self, prompt: str, said: list[tuple[str, SceneObject | None]], weight: float, rng: np.random.Generator
    ) -> _Text:
        words = [(word, item) for phrase, item in said for word in phrase.split()] + [("</s>", None)]
        return _Text(
            self._prompt(prompt, rng),
            [self.ids[word] for word, _ in words],
            [self._banned(word, item) for word, item in words],
            weight,
        )

    def texts(self, item: Scene, rng: np.random.Generator) -> list[_Text]:
        """A caption in the wording the model likes, captions in styles asked for, a question of every type."""
        asked = ["any", *rng.permutation([name for name in STYLES if name != "any"])[: self.styled]]
        captions = [self._text(STYLES[style].prompt, phrases(item, wording(rng, style)), 1.0, rng) for style in asked]
        return captions + [
            self._text(q.text, [(q.answer, q.about)], self.question_weight, rng) for q in questions(item, rng)
        ]

    def __call__(
        self,
        scenes: list[Scene],
        prefix: Int[Tensor, " p"],
        prefix_positions: Int[Tensor, "3 p"],
        rng: np.random.Generator,
    ) -> Packed:
        """Pack each scene's texts. A target's label stands at the position that predicts it."""
        rows = [self.texts(item, rng) for item in scenes]
        longest = max(len(prefix) + sum(len(t.prompt) + len(t.answer) for t in row) for row in rows)
        shape = (len(rows), longest)
        ids = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        banned = np.full(shape, IGNORE, np.int64)
        weights = np.zeros(shape, np.float32)
        positions = np.zeros((3, *shape), np.int64)
        segments = np.full(shape, -1, np.int64)
        begin, after = len(prefix), int(prefix_positions.max()) + 1
        ids[:, :begin], positions[:, :, :begin], segments[:, :begin] = prefix, prefix_positions[:, None], 0
        for row, texts in enumerate(rows):
            start = begin
            for segment, text in enumerate(texts, start=1):
                span = slice(start, start + len(text.prompt) + len(text.answer))
                ids[row, span] = text.prompt + text.answer
                positions[:, row, span] = after + np.arange(span.stop - start)
                segments[row, span] = segment
                targets = slice(start + len(text.prompt) - 1, span.stop - 1)
                labels[row, targets], banned[row, targets] = text.answer, text.banned
                weights[row, targets] = text.weight
                start = span.stop
        same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        causal = np.tril(np.ones((shape[1], shape[1]), bool))
        # A padded query still attends to itself: a row of the mask that is empty would make softmax undefined.
        mask = (same & causal) | np.eye(shape[1], dtype=bool)
        return Packed(
            ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            banned=torch.from_numpy(banned),
            weights=torch.from_numpy(weights),
            positions=torch.from_numpy(positions),
            mask=torch.from_numpy(mask[:, None]),
            image=(prefix == self.image_token).nonzero().flatten(),
        )
