"""How good a dictionary is: activations scored against known facts, with the baselines that give a score its meaning.

A concept's score for a fact is the area under the ROC curve of its activations. The best fact of a concept, or the best
concept of a fact, is chosen on one set of samples and scored on another; the same procedure on shuffled labels shows
what chance gives (a maximum over many is above .5 even for noise, if it is not held out). `f1` scores decisions.

Facts are called `attribute=value` (`colour=red`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def poles(values: Float[Tensor, "n k"]) -> Float[Tensor, "n 2k"]:
    """Both ends of signed activations as concepts of their own, positive ones first: max(a, 0), then max(-a, 0).

    The directions that belong to them are C and then -C. Scored before pooling, so that neither end hides the other.
    """
    return torch.cat([values.clamp_min(0), (-values).clamp_min(0)], dim=1)


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


def shuffled(
    truth: Bool[np.ndarray, "n f"], held_truth: Bool[np.ndarray, "m f"], times: int, seed: int
) -> Iterator[tuple[Bool[np.ndarray, "n f"], Bool[np.ndarray, "m f"]]]:
    """The labels dealt out to other samples, so many times: what chance is measured with."""
    rng = np.random.default_rng(seed)
    for _ in range(times):
        yield truth[rng.permutation(len(truth))], held_truth[rng.permutation(len(held_truth))]


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
    chance = [
        _choose(scores, labels, held_scores, held)[2] for labels, held in shuffled(truth, held_truth, shuffles, seed)
    ]
    return Match(fact, chosen, held_out, np.mean(chance, axis=0))


@dataclass(frozen=True)
class FactMatch:
    """Per fact the best concept, its AUROC where it was chosen and on held-out samples, and chance's AUROC there.

    `concept` is -1, and the scores NaN, for a fact that does not both hold and fail in each of the two sets.
    """

    concept: Int[np.ndarray, " f"]
    chosen: Float[np.ndarray, " f"]
    held_out: Float[np.ndarray, " f"]
    shuffled: Float[np.ndarray, " f"]


def _choose_concepts(
    scores: np.ndarray, truth: np.ndarray, held_scores: np.ndarray, held_truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second = auroc(scores, truth), auroc(held_scores, held_truth)
    usable = np.isfinite(first).all(axis=0) & np.isfinite(second).all(axis=0)
    if not usable.any():
        raise BadInputError("no fact both holds and fails in each of the two sets of samples; give more samples")
    concept = np.where(usable, np.where(usable, first, -1).argmax(axis=0), -1)
    index = np.arange(len(concept))
    return (
        concept,
        np.where(usable, first[concept, index], np.nan),
        np.where(usable, second[concept, index], np.nan),
    )


def match_concepts(
    scores: Float[np.ndarray, "n k"],
    truth: Bool[np.ndarray, "n f"],
    held_scores: Float[np.ndarray, "m k"],
    held_truth: Bool[np.ndarray, "m f"],
    *,
    shuffles: int = 10,
    seed: int = 0,
) -> FactMatch:
    """Find the concept that tells each fact best, and score it on samples that did not choose it.

    What of the truth a dictionary holds at all, to be held against a probe's AUROC; `match_facts` asks what its
    concepts mean. The arguments are those of `match_facts`.
    """
    concept, chosen, held_out = _choose_concepts(scores, truth, held_scores, held_truth)
    chance = [
        _choose_concepts(scores, labels, held_scores, held)[2]
        for labels, held in shuffled(truth, held_truth, shuffles, seed)
    ]
    return FactMatch(concept, chosen, held_out, np.mean(chance, axis=0))


def attribute(fact: str) -> str:
    """`colour` of `colour=red`."""
    return fact.partition("=")[0]


def by_attribute(facts: Sequence[str], values: Float[np.ndarray, " n"]) -> dict[str, float]:
    """The mean of the values per attribute of their facts, in order of appearance; NaN values are left out.

    Args:
        facts: The fact that each value belongs to.
        values: Scores of facts, or of concepts with their matched facts.

    Returns:
        Attribute -> mean; NaN where no value of it is finite.
    """
    numbers = np.asarray(values, float)
    if len(facts) != len(numbers):
        raise BadInputError(f"{len(facts)} facts for {len(numbers)} values; there must be one for each")
    found: dict[str, list[float]] = {}
    for fact, value in zip(facts, numbers, strict=True):
        found.setdefault(attribute(fact), []).extend([float(value)] if np.isfinite(value) else [])
    return {name: float(np.mean(group)) if group else float("nan") for name, group in found.items()}


@dataclass(frozen=True)
class Naming:
    """Which concepts' first word names their fact, the share of them, and the share were words dealt out at random."""

    named: Bool[np.ndarray, " k"]
    share: float
    chance: float


def naming(words: Sequence[Sequence[str]], facts: Sequence[str]) -> Naming:
    """Whether the first word of each concept names its matched fact.

    It does if it is one of the whole words of the fact's value, in any case: "red" for `colour=red`, "top" or "left"
    for `position=top left`. A concept without words names nothing.

    Args:
        words: Per concept its words, best first.
        facts: Per concept its matched fact.

    Raises:
        BadInputError: If there is not one fact per concept, or no concept.
    """
    if len(words) != len(facts) or not facts:
        raise BadInputError(f"{len(words)} lists of words for {len(facts)} facts; there must be one for each concept")
    first = [own[0].casefold() if own else None for own in words]
    values = [set(fact.rpartition("=")[2].casefold().split()) for fact in facts]
    named = np.array([word in value for word, value in zip(first, values, strict=True)])
    # Exact: the mean over all ways to deal the first words out.
    chance = np.mean([[word in value for value in values] for word in first])
    return Naming(named, float(named.mean()), float(chance))


def random_concepts(k: int, d: int, seed: int = 0) -> Float[Tensor, "k d"]:
    """Random unit directions, the dictionary that any other has to beat."""
    drawn = torch.randn(k, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1)
