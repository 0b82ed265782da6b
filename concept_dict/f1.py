"""Matched F1: activations as decisions. Is a sample above a threshold one of which the fact holds?

The threshold of every concept is chosen on one set of samples and used on another, as is done with its fact (see
`metrics`). F1 depends on how common a fact is (always saying yes has 2 p / (1 + p)), which is why the same procedure on
shuffled labels stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from concept_dict.metrics import shuffled
from hooked_mm.errors import BadInputError


@dataclass(frozen=True)
class F1Match:
    """Per pair of a concept and a fact: the threshold, F1 where it was chosen and on held-out samples, and chance's.

    A sample is said to have the fact if its activation is above `threshold`; -inf says yes to all. `shuffled` is the
    mean held-out F1 of the same choice on shuffled labels.
    """

    threshold: Float[np.ndarray, " p"]
    chosen: Float[np.ndarray, " p"]
    held_out: Float[np.ndarray, " p"]
    shuffled: Float[np.ndarray, " p"]


def f1_scores(said: Bool[np.ndarray, "n p"], truth: Bool[np.ndarray, "n p"]) -> Float[np.ndarray, " p"]:
    """F1 = 2 TP / (said + true) column by column; NaN where nothing is said and nothing is true."""
    with np.errstate(invalid="ignore"):
        return 2 * (said & truth).sum(axis=0) / (said.sum(axis=0) + truth.sum(axis=0))


def best_thresholds(
    scores: Float[np.ndarray, "n p"], truth: Bool[np.ndarray, "n p"]
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """The threshold of highest F1 for every column, and that F1.

    Halfway between two neighbouring scores, so that equal scores are never told apart; of several as good the highest.
    """
    wide = scores.astype(np.float64)
    order = np.argsort(-wide, axis=0, kind="stable")
    ranked, hits = np.take_along_axis(wide, order, axis=0), np.take_along_axis(truth, order, axis=0)
    said = np.arange(1, len(wide) + 1)[:, None]
    f1 = 2 * hits.cumsum(axis=0) / (said + hits.sum(axis=0))
    below = np.concatenate([ranked[1:], np.full((1, ranked.shape[1]), -np.inf)])
    best = np.where(ranked > below, f1, -1).argmax(axis=0)
    columns = np.arange(wide.shape[1])
    last = np.isneginf(below[best, columns])
    middle = ranked[best, columns] / 2 + np.where(last, 0, below[best, columns]) / 2
    return np.where(last, -np.inf, middle), f1[best, columns]


def match_f1(
    scores: Float[np.ndarray, "n k"],
    truth: Bool[np.ndarray, "n f"],
    held_scores: Float[np.ndarray, "m k"],
    held_truth: Bool[np.ndarray, "m f"],
    concepts: Int[np.ndarray, " p"],
    facts: Int[np.ndarray, " p"],
    *,
    shuffles: int = 10,
    seed: int = 0,
) -> F1Match:
    """F1 of concepts for the facts they were matched with.

    Args:
        scores: Activations on the samples that choose.
        truth: Their facts.
        held_scores: Activations on other samples.
        held_truth: Their facts.
        concepts: Of every pair, a column of the scores.
        facts: Of every pair, a column of the truths.
        shuffles: Repetitions of the shuffled-label baseline.
        seed: Its seed.

    Raises:
        BadInputError: If scores and truths are not of the same samples, a set is empty, or a pair has no partner.
    """
    for own, labels in ((scores, truth), (held_scores, held_truth)):
        if len(own) != len(labels) or not len(own):
            raise BadInputError(f"{len(own)} scores for {len(labels)} truths; they must be of the same samples")
    for what, index, count in (("concept", concepts, scores.shape[1]), ("fact", facts, truth.shape[1])):
        wrong = [int(item) for item in index if not 0 <= item < count]
        if wrong:
            raise BadInputError(f"{what} {wrong[0]} of {count} can't be scored; leave out what has no partner")
    values, held_values = scores[:, concepts], held_scores[:, concepts].astype(np.float64)

    def score(labels: np.ndarray, held_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        threshold, chosen = best_thresholds(values, labels)
        return threshold, chosen, f1_scores(held_values > threshold, held_labels)

    labels, held_labels = truth[:, facts], held_truth[:, facts]
    chance = [score(*dealt)[2] for dealt in shuffled(labels, held_labels, shuffles, seed)]
    return F1Match(*score(labels, held_labels), np.mean(chance, axis=0))
