"""What a dictionary is scored with: samples with what is known of them, and what several metrics share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from concept_dict.answer_rows import AnswerRows
from concept_dict.bert_score import BertScorer
from concept_dict.clip_score import ClipEncoder
from concept_dict.dictionary import ConceptDictionary
from concept_dict.metrics import FactMatch, Match, fact_table, match_concepts, match_facts, poles, pool_samples
from concept_dict.quality import Fitted
from concept_dict.random_dictionary import RandomDictionary
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import ImageSource
from hooked_mm.store import ActivationStore

Matching = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Scores and truths of the samples that choose, then of the held-out ones."""


@dataclass(frozen=True)
class Samples:
    """Representations with what is known of the samples they are of; None where nothing is.

    Attributes:
        rows: (n, d).
        sample: Per row, its sample, from 0 to `count` - 1.
        count: Number of samples.
        facts: Per sample, what is true of it, as `attribute=value`.
        captions: Per sample, a text that describes it.
        images: Per sample, its picture or the path of one.
    """

    rows: Float[Tensor, "n d"]
    sample: Int[np.ndarray, " n"]
    count: int
    facts: Sequence[Sequence[str]] | None = None
    captions: Sequence[str] | None = None
    images: Sequence[Image.Image | ImageSource] | None = None

    @classmethod
    def of(
        cls, store: ActivationStore, hook: str, images: Sequence[Image.Image | ImageSource] | None = None
    ) -> Samples:
        """A store's rows of one hook, with its samples' facts and captions.

        Captions are the data set's own (`answer`) where every sample has one, else what the model said (`text`).

        Args:
            store: Its table of samples may have a column `facts`.
            hook: Which activations.
            images: Pictures of its samples, in their order; those that the store names the path of unless given.
        """
        table = store.samples

        def column(name: str) -> list[Any] | None:
            values = table.column(name).to_pylist() if name in table.column_names else [None]
            return None if any(value is None for value in values) else values

        paths = column("image")
        paths = paths if paths is not None and all(isinstance(path, str) for path in paths) else None
        return cls(
            store.activations(hook),
            store.row_samples(),
            table.num_rows,
            column("facts"),
            column("answer") or column("text"),
            paths if images is None else images,
        )


@dataclass(frozen=True)
class Evidence:
    """What scores are made of; what is None makes the metrics that need it unavailable.

    Attributes:
        held_out: What everything is scored on.
        fitted: What best facts, concepts and thresholds are chosen on; samples that `held_out` does not have.
        words: Per concept its words, best first; for signed activations those of C and then those of -C.
        runs: Concepts of fits with several seeds (k, d), this one among them or not.
        clip: A CLIP, or its folder.
        bert: A BERT, or its folder.
        model: The model that the dictionary is of.
        answers: Positions to insert and delete concepts at (see `answer_rows.stored_rows`).
        steps: How many concepts to insert and delete, 0 to 10 unless given; each costs six passes per batch.
        vocabulary: What random words are drawn from; all concepts' words unless given.
        seed: Of every baseline.
    """

    held_out: Samples
    fitted: Samples | None = None
    words: Sequence[Sequence[str]] | None = None
    runs: Sequence[Float[Tensor, "k d"]] | None = None
    clip: ClipEncoder | str | Path | None = None
    bert: BertScorer | str | Path | None = None
    model: HookedMM | None = None
    answers: Iterable[AnswerRows] | None = None
    steps: Sequence[int] | None = None
    vocabulary: Sequence[str] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """A dictionary with the evidence, and what several metrics share, computed when first asked for."""

    dictionary: ConceptDictionary
    evidence: Evidence

    @property
    def fitted(self) -> Fitted:
        """The decomposition."""
        return self.dictionary.decomposition

    @cached_property
    def _activations(self) -> dict[str, Tensor]:
        evidence = self.evidence
        sides = {"held_out": evidence.held_out, "fitted": evidence.fitted}
        return {name: self.fitted.transform(side.rows) for name, side in sides.items() if side is not None}

    @cached_property
    def signed(self) -> bool:
        """Whether activations can be negative."""
        return self.dictionary.signed

    @cached_property
    def random(self) -> RandomDictionary:
        """A random dictionary of the same size and kind."""
        return RandomDictionary.like(self.fitted, signed=self.signed, seed=self.evidence.seed)

    def _pool(self, side: Samples, activations: Tensor) -> Float[np.ndarray, "samples k"]:
        return pool_samples(poles(activations) if self.signed else activations, side.sample, side.count)

    @cached_property
    def pooled(self) -> Float[np.ndarray, "samples k"]:
        """Activations of the held-out samples."""
        return self._pool(self.evidence.held_out, self._activations["held_out"])

    @cached_property
    def pooled_random(self) -> Float[np.ndarray, "samples k"]:
        """The random dictionary's."""
        return self._pool(self.evidence.held_out, self.random.transform(self.evidence.held_out.rows))

    @cached_property
    def facts(self) -> list[str]:
        """Every fact of any sample, sorted."""
        sides = (self.evidence.fitted, self.evidence.held_out)
        return sorted({fact for side in sides if side is not None for found in side.facts or () for fact in found})

    @cached_property
    def _tables(self) -> tuple[Bool[np.ndarray, "n f"], Bool[np.ndarray, "m f"]]:
        fitted, held = self.evidence.fitted, self.evidence.held_out
        assert fitted is not None  # it is among the needs
        return fact_table(fitted.facts or (), self.facts), fact_table(held.facts or (), self.facts)

    @cached_property
    def matching(self) -> Matching:
        """Scores and truths of the samples that choose, then of the held-out ones."""
        assert self.evidence.fitted is not None  # it is among the needs
        truth, held_truth = self._tables
        return self._pool(self.evidence.fitted, self._activations["fitted"]), truth, self.pooled, held_truth

    @cached_property
    def matching_random(self) -> Matching:
        """The same of the random dictionary."""
        fitted = self.evidence.fitted
        assert fitted is not None  # it is among the needs
        truth, held_truth = self._tables
        return self._pool(fitted, self.random.transform(fitted.rows)), truth, self.pooled_random, held_truth

    @cached_property
    def match(self) -> Match:
        """The best fact of every concept."""
        return match_facts(*self.matching, seed=self.evidence.seed)

    @cached_property
    def fact_match(self) -> FactMatch:
        """The best concept of every fact."""
        return match_concepts(*self.matching, seed=self.evidence.seed)

    @cached_property
    def fact_match_random(self) -> FactMatch:
        """The random dictionary's."""
        return match_concepts(*self.matching_random, shuffles=1, seed=self.evidence.seed)
