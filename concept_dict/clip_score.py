"""CLIPScore of concepts' words with images: does a picture show what its concepts are called?

CLIPScore(image, text) = 2.5 max(cos(E_image, E_text), 0) (Hessel et al. 2021, arXiv 2104.08718, equation 1), for every
sample on its own. A sample's texts are the first words of the concepts that it activates most (CoX-LMM, arXiv
2406.08074). Images and words are encoded once each, in batches; beside the score stands that of random words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from hooked_mm.errors import BadInputError
from hooked_mm.prepare import ImageSource, load_image

WEIGHT = 2.5
"""The paper's, which brings scores to about 0 to 1."""

PADDING = {"siglip": "max_length", "siglip2": "max_length"}
"""Model types whose text towers were trained on, and so expect, texts padded to full length."""


class ClipEncoder:
    """A CLIP (or SigLIP, ...) of transformers, from a local folder.

    Args:
        folder: With the model and its processor; nothing is downloaded.
        device: Where to run it.
        batch_size: Images or texts at a time.

    Raises:
        BadInputError: If there is no such folder, or no model in it that has image and text features.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu", batch_size: int = 64) -> None:
        if not Path(folder).is_dir():
            raise BadInputError(
                f"there is no folder {str(folder)!r}; give one that holds a CLIP of transformers with its processor "
                "(save_pretrained, or a downloaded snapshot)"
            )
        self.model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).to(device).eval()
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise BadInputError(
                f"{str(folder)!r} holds a {type(self.model).__name__}, which has no features of images and texts in "
                "one space; give a CLIP"
            )
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.device, self.batch_size = torch.device(device), batch_size

    def images(self, images: Sequence[Image.Image | ImageSource]) -> Float[Tensor, "n e"]:
        """Unit features of images (or their files), on the CPU."""

        def encode(part: Sequence[ImageSource]) -> Any:
            inputs = self.processor(images=[load_image(image) for image in part], return_tensors="pt")
            return self.model.get_image_features(**inputs.to(self.device))

        return self._in_batches(images, encode, "images for CLIPScore")

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n e"]:
        """Unit features of texts, on the CPU."""
        padding = PADDING.get(self.model.config.model_type, True)

        def encode(part: Sequence[str]) -> Any:
            inputs = self.processor(text=list(part), return_tensors="pt", padding=padding)
            return self.model.get_text_features(**inputs.to(self.device))

        return self._in_batches(texts, encode, "words for CLIPScore")

    @torch.no_grad()
    def _in_batches(self, items: Sequence[Any], encode: Any, what: str) -> Tensor:
        if not len(items):
            raise BadInputError(f"there are no {what}")
        starts = range(0, len(items), self.batch_size)
        found = []
        for start in tqdm(starts, desc=what, delay=2, leave=False):
            made = encode(items[start : start + self.batch_size])
            # Since transformers 5 an output with fields, before that the tensor itself.
            features = made if isinstance(made, Tensor) else made.pooler_output
            found.append(torch.nn.functional.normalize(features.float(), dim=-1).cpu())
        return torch.cat(found)


@dataclass(frozen=True)
class WordScore:
    """A score of the words of each sample's concepts.

    Attributes:
        samples: Per sample, NaN where no concept with words is active.
        random: The same with random words in their place.
    """

    samples: Float[np.ndarray, " n"]
    random: Float[np.ndarray, " n"]

    @property
    def mean(self) -> float:
        """The mean over samples that have a score."""
        return float(np.nanmean(self.samples)) if np.isfinite(self.samples).any() else float("nan")

    @property
    def random_mean(self) -> float:
        """The mean with random words."""
        return float(np.nanmean(self.random)) if np.isfinite(self.random).any() else float("nan")


def clip_similarity(images: Float[Tensor, "n e"], texts: Float[Tensor, "m e"]) -> Float[Tensor, "n m"]:
    """2.5 max(cos, 0) of every image with every text."""
    unit, other = (torch.nn.functional.normalize(side.float(), dim=-1) for side in (images, texts))
    return WEIGHT * (unit @ other.T).clamp_min(0)


def active_concepts(pooled: Float[np.ndarray, "n k"], concepts: int) -> list[list[int]]:
    """Per sample, up to so many concepts of largest activation above 0, strongest first."""
    order = np.argsort(-pooled, axis=1, kind="stable")[:, :concepts]
    return [[int(k) for k in row if values[k] > 0] for row, values in zip(order, pooled, strict=True)]


def words_of_samples(
    pooled: Float[np.ndarray, "n k"], words: Sequence[Sequence[str]], *, concepts: int = 1, count: int = 1
) -> list[list[str]]:
    """Per sample, the first `count` words of each of its `concepts` strongest concepts; empty if there are none.

    Raises:
        BadInputError: If there is not one list of words per concept, or a number is below 1.
    """
    if pooled.shape[1] != len(words):
        raise BadInputError(
            f"activations of {pooled.shape[1]} concepts, but words of {len(words)}; there must be a list for each"
        )
    if concepts < 1 or count < 1:
        raise BadInputError(f"concepts={concepts}, count={count}: both must be at least 1")
    return [[word for k in chosen for word in words[k][:count]] for chosen in active_concepts(pooled, concepts)]


def random_words(said: Sequence[Sequence[str]], vocabulary: Sequence[str], *, seed: int = 0) -> list[list[str]]:
    """For every sample as many different words of the vocabulary as it has (all, if it has more), by chance.

    Raises:
        BadInputError: If the vocabulary is empty.
    """
    options = list(dict.fromkeys(vocabulary))
    if not options:
        raise BadInputError("there are no words to draw from; give a vocabulary, or concepts with words")
    rng = np.random.default_rng(seed)
    return [[options[i] for i in rng.permutation(len(options))[: len(own)]] for own in said]


def clip_score(
    encoder: ClipEncoder,
    images: Sequence[Image.Image | ImageSource] | Float[Tensor, "n e"],
    pooled: Float[np.ndarray, "n k"],
    words: Sequence[Sequence[str]],
    *,
    concepts: int = 1,
    counts: Sequence[int] = (1, 3),
    vocabulary: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[int, WordScore]:
    """CLIPScore of each sample's image with the words of its strongest concepts, averaged over these words.

    Args:
        encoder: The CLIP.
        images: One per sample, or their features by `encoder.images`.
        pooled: Activations of the samples (see `metrics.pool_samples`).
        words: Per concept its words, best first.
        concepts: How many concepts of each sample count.
        counts: How many words of each concept count: top-1, top-3, ...
        vocabulary: What random words are drawn from; all concepts' words unless given.
        seed: Of that draw.

    Returns:
        Count of words -> score beside that of as many random words.

    Raises:
        BadInputError: If there is not one image per sample, or no concept has words.
    """
    if len(images) != len(pooled):
        raise BadInputError(f"{len(images)} images for {len(pooled)} samples; there must be one for each")
    known = [word for own in words for word in own]
    options = known if vocabulary is None else list(vocabulary)
    texts = list(dict.fromkeys([*known, *options]))
    if not texts:
        raise BadInputError("no concept has words, so there is nothing to score; see grounding.top_words")
    features = images if isinstance(images, Tensor) else encoder.images(images)
    table = clip_similarity(features, encoder.texts(texts)).numpy()
    place = {word: column for column, word in enumerate(texts)}

    def score(said: Sequence[Sequence[str]]) -> Float[np.ndarray, " n"]:
        return np.array(
            [row[[place[word] for word in own]].mean() if own else np.nan for row, own in zip(table, said, strict=True)]
        )

    found = {}
    for count in counts:
        said = words_of_samples(pooled, words, concepts=concepts, count=count)
        found[count] = WordScore(score(said), score(random_words(said, options, seed=seed)))
    return found
