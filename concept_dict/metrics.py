"""How good a dictionary is: activations scored against known facts, with the baselines that give a score its meaning.

A concept's score for a fact is the area under the ROC curve of its activations. The best fact of a concept is chosen on
one set of samples and scored on another; the same procedure on shuffled labels shows what chance gives (a maximum over
many facts is above .5 even for noise, if it is not held out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor

from hooked_mm.errors import BadInputError


def pool_samples(
    activations: Float[Tensor, "n k"], samples: Int[np.ndarray, " n"], count: int
) -> Float[np.ndarray, "samples k"]:
    """Each concept's largest activation over the rows of a sample; 0 for a sample without rows."""
    pooled = np.full((count, activations.shape[1]), -np.inf, np.float32)
    np.maximum.at(pooled, samples, activations.cpu().numpy())
    return np.where(np.isneginf(pooled), 0, pooled)


def fact_table(facts: Sequence[Sequence[str]], names: Sequence[str]) -> Bool[np.ndarray, "samples facts"]:
    """Which facts hold for which sample."""
    index = {name: column for column, name in enumerate(names)}
    table = np.zeros((len(facts), len(names)), bool)
    for row, found in enumerate(facts):
        unknown = [name for name in found if name not in index]
        if unknown:
            raise BadInputError(
                f"sample {row} has the fact {unknown[0]!r}, which is not among the names; add it to them"
            )
        table[row, [index[name] for name in found]] = True
    return table


def auroc(scores: Float[np.ndarray, "n k"], truth: Bool[np.ndarray, "n f"]) -> Float[np.ndarray, "k f"]:
    """Area under the ROC curve of every score column for every truth column, ties counted half (Mann-Whitney).

    NaN where a fact holds for all samples or for none.
    """
    if len(scores) != len(truth):
        raise BadInputError(f"{len(scores)} scores for {len(truth)} truths; they must be of the same samples")
    ranks = rankdata(scores, axis=0)
    positive = truth.sum(axis=0).astype(float)
    negative = len(truth) - positive
    with np.errstate(divide="ignore", invalid="ignore"):
        return (ranks.T @ truth - positive * (positive + 1) / 2) / (positive * negative)


@dataclass(frozen=True)
class Match:
    """Per concept the best fact, its AUROC where it was chosen and on held-out samples, and chance's AUROC there.

    `fact` indexes the facts' columns; `shuffled` is the mean held-out AUROC of the same choice on shuffled labels.
    """

    fact: Int[np.ndarray, " k"]
    chosen: Float[np.ndarray, " k"]
    held_out: Float[np.ndarray, " k"]
    shuffled: Float[np.ndarray, " k"]


def _choose(
    scores: np.ndarray, truth: np.ndarray, held_scores: np.ndarray, held_truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second = auroc(scores, truth), auroc(held_scores, held_truth)
    usable = np.isfinite(first) & np.isfinite(second)
    if not usable.any(axis=1).all():
        raise BadInputError("no fact both holds and fails in each of the two sets of samples; give more samples")
    fact = np.where(usable, first, -1).argmax(axis=1)
    index = np.arange(len(fact))
    return fact, first[index, fact], second[index, fact]


def match_facts(
    scores: Float[np.ndarray, "n k"],
    truth: Bool[np.ndarray, "n f"],
    held_scores: Float[np.ndarray, "m k"],
    held_truth: Bool[np.ndarray, "m f"],
    *,
    shuffles: int = 10,
    seed: int = 0,
) -> Match:
    """Name each concept by the fact it separates best, and score that on samples that did not choose it.

    Args:
        scores: Activations on the samples that choose.
        truth: Their facts.
        held_scores: Activations on other samples.
        held_truth: Their facts.
        shuffles: Repetitions of the shuffled-label baseline.
        seed: Its seed.
    """
    fact, chosen, held_out = _choose(scores, truth, held_scores, held_truth)
    rng = np.random.default_rng(seed)
    chance = [
        _choose(scores, truth[rng.permutation(len(truth))], held_scores, held_truth[rng.permutation(len(held_truth))])[
            2
        ]
        for _ in range(shuffles)
    ]
    return Match(fact, chosen, held_out, np.mean(chance, axis=0))


def random_concepts(k: int, d: int, seed: int = 0) -> Float[Tensor, "k d"]:
    """Random unit directions, the dictionary that any other has to beat."""
    drawn = torch.randn(k, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1)
