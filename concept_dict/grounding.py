"""What a concept means: the words it decodes to, and the samples that activate it most.

A signed decomposition (PCA) has two ends per concept: c_k and -c_k, the samples of largest and of smallest activation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.unembedding import Unembedding

STOPWORDS = frozenset(
    """a an and are as at be but by for from had has have he her his i in into is it its of on or she so that the their
    them they this to was we were which with you your""".split()
)
"""Words that say nothing about a concept, unless a list of one's own is given."""


def read_words(path: str | Path) -> frozenset[str]:
    """A list of one's own, of stopwords or of a vocabulary: a text file of words apart by white space, case ignored.

    Raises:
        BadInputError: If there is no such file.
    """
    if not Path(path).is_file():
        raise BadInputError(f"there is no list of words {str(path)!r}; give a text file")
    return frozenset(Path(path).read_text(encoding="utf-8").lower().split())


Transform = Callable[[Tensor], Tensor]
"""Activations (n, k) of rows (n, d)."""


@dataclass(frozen=True)
class Word:
    """A word a concept decodes to, with its probability under the model's own unembedding."""

    text: str
    probability: float


Decode = Callable[[Tensor], list[list[Word]]]
"""The words that directions (k, d) decode to in a model, of each the most probable first."""


def is_whole_word(tokenizer: Any, token: int) -> bool:
    """Whether a token spells a whole word: letters only, and what the tokenizer makes of that word in a text.

    True also of a token that begins longer words and would be made of that piece alone.
    """
    text = tokenizer.decode([token]).strip()
    if not text.isalpha():
        return False
    # Behind itself, since some tokenizers put a space of their own before a text and some do not.
    once = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(f"{text} {text}", add_special_tokens=False)["input_ids"] == [*once, token]


def top_words(
    model: HookedMM | Unembedding,
    concepts: Float[Tensor, "k d"],
    count: int = 5,
    stopwords: Collection[str] = STOPWORDS,
    candidates: int = 100,
    vocabulary: Collection[str] | None = None,
) -> list[list[Word]]:
    """The words each concept decodes to: softmax(unembed(final norm(c_k))), most probable first.

    Tokens that are not whole words, stopwords and repetitions (in another case) are left out; probabilities are those
    over the whole vocabulary.

    Args:
        model: Whose final norm and unembedding to use; these alone will do.
        concepts: C (k, d), directions in the residual stream.
        count: Words per concept.
        stopwords: Words to leave out, in any case.
        candidates: Most probable tokens to look through.
        vocabulary: The only words to name, in any case; all unless given. A token that begins longer words ("catal")
            can't be told from a word by the tokenizer alone, but by a list of words.

    Raises:
        BadInputError: If the concepts are not directions of this model's residual stream.
    """
    if concepts.ndim != 2 or concepts.shape[1] != model.cfg.d_model:
        raise BadInputError(
            f"concepts of shape {tuple(concepts.shape)} are no directions of a residual stream of width "
            f"{model.cfg.d_model}; give the model the dictionary was made of"
        )
    stopwords = {word.lower() for word in stopwords}
    allowed = None if vocabulary is None else {word.lower() for word in vocabulary}
    # Concepts have norm 1; a norm's epsilon is meant for entries of size 1.
    scaled = concepts.to(model.device) * concepts.shape[1] ** 0.5
    probabilities = model.to_logits(scaled).float().softmax(dim=-1).cpu()
    best = probabilities.topk(min(candidates, probabilities.shape[1]), dim=-1)
    found = []
    for values, tokens in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        words: dict[str, Word] = {}
        for value, token in zip(values, tokens, strict=True):
            text = model.tokenizer.decode([token]).strip()
            key = text.lower()
            if key in words or key in stopwords or (allowed is not None and key not in allowed):
                continue
            if not is_whole_word(model.tokenizer, token):
                continue
            words[key] = Word(text, value)
            if len(words) == count:
                break
        found.append(list(words.values()))
    return found


def is_signed(concepts: Float[Tensor, "k d"], mean: Float[Tensor, " d"], transform: Transform) -> bool:
    """Whether activations can be negative, told by those of mean - c_k."""
    return bool((transform(mean - concepts) < 0).any())


def top_samples(pooled: Float[np.ndarray, "samples k"], count: int) -> list[list[int]]:
    """Per concept, the samples that activate it most, strongest first; only those that activate it at all.

    For the other end of a signed method, give the negated activations.
    """
    order = np.argsort(-pooled, axis=0, kind="stable")[:count]
    return [[int(row) for row in order[:, k] if pooled[row, k] > 0] for k in range(pooled.shape[1])]
