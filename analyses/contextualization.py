"""How much of its context a representation holds: self-similarity, intra-sentence similarity, explained variance.

Ethayarajh (2019), "How contextual are contextualized word representations?", D19-1006. With x_i the representations of
one word's n occurrences, u_i = x_i / |x_i|, and of one sentence's n tokens with mean m:

    SelfSim  = 1 / (n^2 - n)  sum_{i != j} cos(x_i, x_j)  =  (|sum_i u_i|^2 - n) / (n^2 - n)
    IntraSim = 1 / n          sum_i cos(x_i, m)           =  (sum_i u_i) . m / (n |m|)
    MEV      = s_1^2 / sum_k s_k^2,   s the singular values of the occurrences' matrix, *not* centred

SelfSim and MEV are 1 for a word that is the same everywhere. Where all representations point one way (anisotropy) all
three are high without meaning anything, so from each its baseline is subtracted: from SelfSim and IntraSim the mean
cosine of random occurrences, each of another sentence; from MEV that of random occurrences, *as many as the word has*
(of few vectors the first direction explains much by chance). IntraSim compares a token with a mean that it is part of,
as published: n unrelated tokens of like norm have 1 / sqrt(n), so short and long sentences are not to be compared.

An image is a sentence of patches; a patch position over images is a word. Every context counts once, see `contexts`.

Intervals are by sentence. Each measure is a function of weights on sentences, all 1; its slopes (the infinitesimal
jackknife, Efron 1982) give every sentence a pseudo-value, whose mean is the measure and whose bootstrap is that of the
measure to first order, words that share a sentence moving together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from analyses.anisotropy import unit
from hooked_mm.errors import BadInputError

IntArray = Int[np.ndarray, " n"]
Read = Callable[[IntArray], Tensor]
"""Rows by their numbers, (m, d), of any dtype."""

HELD = 2**24
"""Numbers of float64 held at a time (128 MB), unless one word or sentence alone has more."""


class Value(NamedTuple):
    """A measure of some rows and its derivative by each row's weight."""

    value: float
    slopes: Float64[Tensor, " n"]


def mean_cosine(rows: Float[Tensor, "n d"]) -> Value:
    """The mean cosine over pairs of *different* rows: SelfSim of a word's occurrences, or a baseline of random ones.

    In closed form from the norm of the sum of unit vectors, in n d steps; no vector is compared with itself.

    Args:
        rows: At least two, none of norm zero.
    """
    units, n = unit(rows), len(rows)
    total = units.sum(0)
    value = float((total @ total - n) / (n * n - n))
    return Value(value, 2 * ((units @ total - 1) - value * (n - 1)) / (n * n - n))


def intra_similarity(rows: Float[Tensor, "n d"]) -> float:
    """IntraSim of a sentence: the mean cosine of its tokens with their mean; NaN if that mean is zero.

    Args:
        rows: The tokens of one sentence, none of norm zero.
    """
    mean = rows.double().mean(0)
    return float(unit(rows).sum(0) @ mean / (len(rows) * torch.linalg.vector_norm(mean)))


def explained_by_first(rows: Float[Tensor, "n d"]) -> Value:
    """MEV: s_1^2 / sum s^2 of the rows as they are, *not* centred; the share one static vector's direction explains.

    From the smaller of the two Gram matrices.

    Args:
        rows: At least one that is not zero.
    """
    wide = rows.double()
    sizes = wide.square().sum(1)
    if wide.shape[0] <= wide.shape[1]:
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        along = values[-1] * vectors[:, -1].square()
    else:
        values, vectors = torch.linalg.eigh(wide.T @ wide)
        along = (wide @ vectors[:, -1]).square()
    total = sizes.sum()
    value = values[-1] / total
    return Value(float(value), (along - value * sizes) / total)


@dataclass(frozen=True)
class Estimate:
    """One measure, over words, sentences or draws.

    Attributes:
        each: A value per word, sentence or draw; NaN where one was left out.
        slopes: Derivative of their mean by the weight of each sentence (all weights are 1); they sum to 0.
    """

    each: Float64[Tensor, " g"]
    slopes: Float64[Tensor, " s"]

    @property
    def value(self) -> float:
        """The mean over words, sentences or draws; NaN if there are none."""
        return float(self.each.nanmean())

    def pseudo(self) -> Float64[Tensor, " s"]:
        """A value per sentence: their mean is `value`, and a bootstrap over them is one over sentences."""
        return self.value + len(self.slopes) * self.slopes

    def minus(self, other: Estimate) -> Estimate:
        """The difference; of one value, or one per word as here."""
        return Estimate(self.each - other.each, self.slopes - other.slopes)


@dataclass(frozen=True)
class Plan:
    """Which rows are compared with which, the same in all layers.

    Attributes:
        words: Number of a word -> its rows, each in a context of its own.
        sentences: Number of a sentence -> its rows.
        sentence: Per row, the place of its sentence in `sentences`; -1 for rows left out.
        pairs: Per draw, random rows of as many different sentences, for the baseline of the cosines.
        orders: Per draw, rows in random order, the first n of which are the baseline of a word with n occurrences.
        counts: What was left out, and why.
    """

    words: dict[int, IntArray]
    sentences: dict[int, IntArray]
    sentence: IntArray
    pairs: list[IntArray]
    orders: list[IntArray]
    counts: dict[str, int]


def plan(
    words: IntArray,
    sentences: IntArray,
    firsts: IntArray | None = None,
    *,
    least: int = 5,
    most: int = 500,
    baseline: int = 1000,
    repeats: int = 5,
    seed: int = 0,
) -> Plan:
    """Choose the rows, before any is read.

    Args:
        words: Per row the number of its word; -1 for a row without one, which counts in its sentence only.
        sentences: Per row the number of its sentence.
        firsts: Per row the first of its context (see `contexts.first_of_context`); all are, unless given.
        least: A word needs so many contexts (5 in the paper).
        most: Of a word with more, so many are drawn.
        baseline: Random occurrences, each of another sentence, whose mean cosine is the baseline (1000 in the paper);
            as many as there are sentences if those are fewer.
        repeats: Draws that a baseline is the mean of.
        seed: Of all draws.

    Raises:
        BadInputError: If the three have different lengths, settings are out of range, or there are no two sentences.
    """
    n = len(words)
    first = np.arange(n) if firsts is None else firsts
    if not n == len(sentences) == len(first):
        raise BadInputError(f"{n} words, {len(sentences)} sentences, {len(first)} contexts; give one of each per row")
    if min(least, most, baseline) < 2 or most < least or repeats < 1:
        raise BadInputError(
            f"least={least}, most={most}, baseline={baseline}, repeats={repeats}; cosines need two rows at least, most "
            "can't be below least, and there must be a draw"
        )
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(first == np.arange(n))
    by_sentence = _grouped(sentences, kept)
    if len(by_sentence) < 2:
        raise BadInputError(f"{len(by_sentence)} sentences; the baseline takes each occurrence from another: give two")
    by_word = _grouped(words, kept[words[kept] >= 0])
    enough = {key: rows for key, rows in by_word.items() if len(rows) >= least}
    cut = {key: np.sort(rng.permutation(rows)[:most]) for key, rows in enough.items()}
    place = np.full(n, -1)
    for index, rows in enumerate(by_sentence.values()):
        place[rows] = index
    every = list(by_sentence.values())
    pairs = [
        np.array([rng.choice(every[index]) for index in rng.permutation(len(every))[:baseline]]) for _ in range(repeats)
    ]
    largest = max((len(rows) for rows in cut.values()), default=0)
    counts = {
        "repeated_contexts": n - len(kept),
        "rows_without_word": int((words[kept] < 0).sum()),
        "words": len(cut),
        "words_too_rare": len(by_word) - len(enough),
        "occurrences_above_most": sum(len(rows) - len(cut[key]) for key, rows in enough.items()),
        "sentences": len(every),
        "sentences_of_one_token": sum(len(rows) < 2 for rows in every),
        "baseline": len(pairs[0]),
    }
    alone = {key: rows for key, rows in by_sentence.items() if len(rows) > 1}
    return Plan(cut, alone, place, pairs, [rng.permutation(kept)[:largest] for _ in range(repeats)], counts)


def _grouped(numbers: IntArray, rows: IntArray) -> dict[int, IntArray]:
    """Number -> those of `rows` that have it, in order."""
    order = rows[np.argsort(numbers[rows], kind="stable")]
    keys, starts = np.unique(numbers[order], return_index=True)
    return dict(zip(keys.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else {}


@dataclass(frozen=True)
class Contextualization:
    """The measures of one layer, each before its baseline is subtracted, and the baselines.

    Attributes:
        words: Numbers of the words, in the order of their values.
        sentences: Numbers of the sentences, in the order of theirs.
        raw_self_similarity: SelfSim per word.
        raw_intra_similarity: IntraSim per sentence.
        raw_explained: MEV per word.
        baseline_cosine: Mean cosine of random occurrences, one value: the mean of the draws.
        baseline_explained: Per word, MEV of as many random occurrences, mean of the draws.
        zeros: Rows of norm zero, left out.
    """

    words: list[int]
    sentences: list[int]
    raw_self_similarity: Estimate
    raw_intra_similarity: Estimate
    raw_explained: Estimate
    baseline_cosine: Estimate
    baseline_explained: Estimate
    zeros: int

    @property
    def self_similarity(self) -> Estimate:
        """SelfSim above the cosine of random occurrences."""
        return self.raw_self_similarity.minus(self.baseline_cosine)

    @property
    def intra_similarity(self) -> Estimate:
        """IntraSim above the cosine of random occurrences."""
        return self.raw_intra_similarity.minus(self.baseline_cosine)

    @property
    def explained(self) -> Estimate:
        """MEV above that of as many random occurrences."""
        return self.raw_explained.minus(self.baseline_explained)


def measure(read: Read, chosen: Plan) -> Contextualization:
    """All measures of one layer; of its rows, one block of words or sentences is held at a time.

    Args:
        read: Gives the rows, from wherever they lie.
        chosen: See `plan`.

    Raises:
        BadInputError: If a row is not finite.
    """
    zeros: set[int] = set()
    total = int(chosen.sentence.max()) + 1
    alike, explained = [], []
    for rows, places in _blocks(read, list(chosen.words.values()), chosen, zeros):
        alike.append((_of(mean_cosine, rows), places))
        explained.append((_of(explained_by_first, rows), places))
    within = [
        intra_similarity(rows) if len(rows) > 1 else math.nan
        for rows, _ in _blocks(read, list(chosen.sentences.values()), chosen, zeros)
    ]
    pairs = [(_of(mean_cosine, rows), places) for rows, places in _blocks(read, chosen.pairs, chosen, zeros)]
    cosine = _mean(pairs, total)
    sizes = [len(rows) for rows in chosen.words.values()]
    drawn: dict[int, list[tuple[Value, Tensor]]] = {size: [] for size in sizes}
    for rows, places in _blocks(read, chosen.orders if sizes else [], chosen, zeros):
        for size, found in drawn.items():
            found.append((_of(explained_by_first, rows[:size]), places[:size]))
    random = {size: _mean(found, total) for size, found in drawn.items()}
    slopes = torch.zeros(total, dtype=torch.float64)
    for size in sizes:
        slopes += random[size].slopes / len(sizes)
    return Contextualization(
        list(chosen.words),
        list(chosen.sentences),
        _mean(alike, total),
        _over_sentences(within, chosen, total),
        _mean(explained, total),
        Estimate(torch.tensor([cosine.value], dtype=torch.float64), cosine.slopes),
        Estimate(torch.tensor([random[size].value for size in sizes], dtype=torch.float64), slopes),
        len(zeros),
    )


def contextualization(
    values: Float[Tensor, "n d"], words: IntArray, sentences: IntArray, firsts: IntArray | None = None, **settings: int
) -> Contextualization:
    """All measures of rows that are at hand.

    Args:
        values: The representations.
        words: Per row the number of its word, or -1.
        sentences: Per row the number of its sentence.
        firsts: Per row the first of its context.
        settings: See `plan`.

    Raises:
        BadInputError: See `plan` and `measure`.
    """
    return measure(lambda rows: values[torch.from_numpy(rows)], plan(words, sentences, firsts, **settings))


def _of(function: Callable[[Tensor], Value], rows: Float64[Tensor, "m d"]) -> Value:
    """A measure of rows; NaN where zero rows left fewer than two."""
    return function(rows) if len(rows) > 1 else Value(math.nan, rows.new_zeros(0))


def _mean(found: Sequence[tuple[Value, Tensor]], sentences: int) -> Estimate:
    """The mean of measures of rows, each with the sentences of its rows."""
    slopes = torch.zeros(sentences, dtype=torch.float64)
    each = torch.tensor([one.value for one, _ in found], dtype=torch.float64)
    for one, places in found:
        slopes.index_add_(0, places[: len(one.slopes)], one.slopes.cpu() / max(1, int(each.isfinite().sum())))
    return Estimate(each, slopes)


def _over_sentences(found: Sequence[float], chosen: Plan, sentences: int) -> Estimate:
    """The mean of a value per sentence."""
    each, slopes = torch.tensor(found, dtype=torch.float64), torch.zeros(sentences, dtype=torch.float64)
    places = torch.tensor([int(chosen.sentence[rows[0]]) for rows in chosen.sentences.values()], dtype=torch.long)
    known = each.isfinite()
    slopes[places[known]] = (each[known] - each[known].mean()) / max(1, int(known.sum()))
    return Estimate(each, slopes)


def _blocks(
    read: Read, groups: Sequence[IntArray], chosen: Plan, zeros: set[int]
) -> Iterator[tuple[Float64[Tensor, "m d"], Int[Tensor, " m"]]]:
    """The rows of each group that are not zero, with their sentences, read several groups at a time."""
    waiting: list[IntArray] = []
    width, count = read(np.zeros(0, dtype=int)).shape[1], 0
    for index, group in enumerate(groups):
        waiting.append(group)
        count += len(group)
        if index + 1 < len(groups) and width * (count + len(groups[index + 1])) <= HELD:
            continue
        every = np.concatenate(waiting)
        rows = read(every).double()
        if not bool(rows.isfinite().all()):
            bad = int(every[int((~rows.isfinite().all(1)).nonzero()[0, 0])])
            raise BadInputError(f"row {bad} of the representations is not finite; leave its sample out")
        start = 0
        for part in waiting:
            own = rows[start : start + len(part)]
            full = own.any(dim=1)
            zeros.update(part[~full.cpu().numpy()].tolist())
            yield own[full], torch.from_numpy(chosen.sentence[part[full.cpu().numpy()]])
            start += len(part)
        waiting, count = [], 0
