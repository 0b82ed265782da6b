"""CIDEr: how much a caption says what people's captions of the same picture say, weighted by how rare the words are.

Vedantam et al. 2015 (arXiv 1411.5726), in the form that COCO's captions are scored with (the class `Cider` of
pycocoevalcap 1.2), which differs from the paper: counts are clipped, and a Gaussian punishes differences in length.

For n = 1 to 4, g_n(text) is the vector over n-grams of count * (log N - log max(1, df)), where N is the number of
pictures and df the number of pictures that have the n-gram in any reference. For a candidate c with references R:

    CIDEr_n(c, r) = sum_g min(g_n(c), g_n(r)) g_n(r) / (|g_n(c)| |g_n(r)|) * exp(-(l_c - l_r)^2 / (2 sigma^2))
    CIDEr(c) = 10 * mean over n and over r in R of CIDEr_n(c, r)

with sigma = 6, and l the number of tokens (pycocoevalcap counts bigrams, which differ by the same). Weights come from
the references of the pictures that are scored: CIDEr is a number about a set of pictures (0 of one alone), to compare
on the same set.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from hooked_mm.errors import BadInputError
from steering.gathered import RecordMetric, check_lengths

LONGEST = 4
SIGMA = 6.0
Gram = tuple[str, ...]


class GramVector(NamedTuple):
    """Per n: the weight of each n-gram and the vector's norm; and the number of tokens."""

    weights: list[dict[Gram, float]]
    norms: list[float]
    length: int


def grams(tokens: Sequence[str]) -> Counter[Gram]:
    """How often each sequence of one to four tokens occurs."""
    return Counter(
        tuple(tokens[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(tokens) - n + 1)
    )


def vector(counts: Counter[Gram], rarity: dict[Gram, float], unseen: float) -> GramVector:
    """Counts times rarity; an n-gram that no reference has is as rare as one that a single picture has."""
    weights: list[dict[Gram, float]] = [{} for _ in range(LONGEST)]
    for gram, count in counts.items():
        weights[len(gram) - 1][gram] = count * rarity.get(gram, unseen)
    norms = [math.sqrt(sum(weight**2 for weight in own.values())) for own in weights]
    return GramVector(weights, norms, sum(count for gram, count in counts.items() if len(gram) == 1))


def similarity(candidate: GramVector, reference: GramVector) -> float:
    """The mean over n of the clipped cosine, times the penalty for length."""
    cosines = 0.0
    for own, other, *norms in zip(candidate.weights, reference.weights, candidate.norms, reference.norms, strict=True):
        if all(norms):
            shared = own.keys() & other.keys()
            cosines += sum(min(own[gram], other[gram]) * other[gram] for gram in shared) / math.prod(norms)
    return cosines / LONGEST * math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))


def cider(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[float, Float64[Tensor, " n"]]:
    """CIDEr of tokenised captions.

    Args:
        candidates: Per picture, the tokens of its caption.
        references: Per picture, the tokens of each of its reference captions.

    Returns:
        The mean over pictures (0 to 10), and the score of each.

    Raises:
        BadInputError: If there are no pictures, one has no references, or the lists differ in length.
    """
    check_lengths(candidates=candidates, references=references)
    if not candidates:
        raise BadInputError("there are no captions; CIDEr is a mean over pictures, give at least two")
    for sample, given in enumerate(references):
        if not given:
            raise BadInputError("no reference caption; leave out pictures without any", sample)
    counted = [[grams(tokens) for tokens in given] for given in references]
    frequency = Counter(gram for texts in counted for gram in set().union(*texts))
    unseen = math.log(len(candidates))
    rarity = {gram: unseen - math.log(count) for gram, count in frequency.items()}
    scores = []
    for tokens, texts in zip(candidates, counted, strict=True):
        own = vector(grams(tokens), rarity, unseen)
        found = [similarity(own, vector(counts, rarity, unseen)) for counts in texts]
        scores.append(10 * sum(found) / len(found))
    return math.fsum(scores) / len(scores), torch.tensor(scores, dtype=torch.float64)


class CIDEr(RecordMetric):
    """CIDEr of the captions of all processes, with the n-gram weights of all their references."""

    def update(self, candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> None:
        """Add tokenised captions and the references of the same pictures; see `cider`.

        Raises:
            BadInputError: If the lists differ in length.
        """
        check_lengths(candidates=candidates, references=references)
        self.keep(
            (list(own), [list(tokens) for tokens in given]) for own, given in zip(candidates, references, strict=True)
        )

    def compute(self) -> float:
        """The mean over pictures.

        Raises:
            BadInputError: If there are no pictures, or one has no references.
        """
        records = self.records()
        return cider([own for own, _ in records], [given for _, given in records])[0]
