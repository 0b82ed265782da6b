"""From two stores to studies of shifts: rows in pairs, samples in parts, words, and shift vectors to keep."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from concept_dict.grounding import STOPWORDS, Decode, Word, top_words
from concept_dict.recovery import Words
from concept_dict.run_table import method_settings
from concept_dict.shift_study import Part, ShiftStudy
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.paired_rows import PairedRows, split_samples
from hooked_mm.steering_vector import SteeringVector
from hooked_mm.store import ActivationStore
from hooked_mm.unembedding import Unembedding

LEARN, SHIFT, MEASURE = "learn", "shift", "measure"
SHARES = {LEARN: 0.4, SHIFT: 0.3, MEASURE: 0.3}
"""Of the samples, where the original's dictionary is still to be learnt; otherwise the other two get half each."""


@dataclass(frozen=True)
class Dealt:
    """Rows of both models in parts.

    Attributes:
        parts: `learn` (if there is something to learn), `shift` and `measure`.
        samples: Per part the ids of the samples that `Part.sample` numbers.
    """

    parts: Mapping[str, Part]
    samples: Mapping[str, list[str]]


def deal(
    original: ActivationStore,
    tuned: ActivationStore,
    pairs: PairedRows,
    hook: str,
    shares: Mapping[str, float] = SHARES,
    seed: int = 0,
) -> Dealt:
    """Read the rows of a hook, samples dealt into parts; all rows that are paired are in memory then.

    Args:
        original: The original model's store.
        tuned: The fine-tuned model's.
        pairs: Which of their rows belong together.
        hook: Whose activations.
        shares: Part -> share of the samples.
        seed: Of the dealing.

    Raises:
        UnknownHookError: If a store does not hold the hook.
        BadInputError: If there are too few samples for the parts, or no pairs.
    """
    if not len(pairs):
        raise BadInputError(f"no rows of the two stores belong together:\n{pairs.describe()}")
    parts, samples = {}, {}
    for name, index in zip(shares, split_samples(pairs, list(shares.values()), seed), strict=True):
        present, number = np.unique(pairs.sample[index], return_inverse=True)
        rows = (original.activations(hook, pairs.original[index]), tuned.activations(hook, pairs.tuned[index]))
        parts[name] = Part(*rows, number.reshape(-1))
        samples[name] = [pairs.samples[sample] for sample in present]
    return Dealt(parts, samples)


def decoder(
    model: HookedMM | Unembedding,
    count: int = 10,
    stopwords: Collection[str] = STOPWORDS,
    vocabulary: Collection[str] | None = None,
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Decode:
    """What directions decode to in a model, see `grounding.top_words`.

    Args:
        model: Whose final norm and unembedding to use.
        count: Words per direction.
        stopwords: Words to leave out.
        vocabulary: The only words to name; all unless given.
        reading: What is open while the model is read: with its adapter off it is its base.
    """

    def decode(directions: Float[Tensor, "k d"]) -> list[list[Word]]:
        with reading(), torch.no_grad():
            return top_words(model, normalize(directions.float()), count, stopwords, vocabulary=vocabulary)

    return decode


def spelled(decode: Decode) -> Words:
    """The same as bare words, which is what studies compare."""
    return lambda directions: [[word.text for word in words] for words in decode(directions)]


def texts_of(store: ActivationStore, samples: Sequence[str]) -> list[str]:
    """What was said of each sample; its id where the store has no texts."""
    names = store.samples.column_names
    if "text" not in names:
        return list(samples)
    said = dict(zip(store.samples.column("sample").to_pylist(), store.samples.column("text").to_pylist(), strict=True))
    return [said.get(sample) or sample for sample in samples]


def places_of(store: ActivationStore, samples: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Where the samples stand in the store's table."""
    place = {sample: number for number, sample in enumerate(store.samples.column("sample").to_pylist())}
    return np.array([place[sample] for sample in samples])


def circular(made_by: Mapping[str, Any], store: ActivationStore) -> bool:
    """Whether a dictionary was learnt from the same samples, as far as both tell: then scores are in sample."""
    data = made_by.get("data")
    return bool(data) and data == store.made_by.get("data")


def shift_steering_vectors(
    found: ShiftStudy, original: ActivationStore, tuned: ActivationStore, hook: str, words: Sequence[Sequence[str]] = ()
) -> list[SteeringVector]:
    """Every concept's shift vector, and the one over all rows, as directions to steer with.

    Args:
        found: The study.
        original: The store its rows came from; says which model and positions.
        tuned: The fine-tuned model's.
        hook: The rows' hook point.
        words: Of the concepts, for the vectors' names.

    Returns:
        The overall shift first, then those of concepts that have rows.
    """
    made, theirs = original.made_by, tuned.made_by
    shifts, settings = found.shifts, found.settings
    about = {
        "tuned": {name: theirs.get(name) for name in ("model", "revision", "adapter")},
        "average": settings.average,
        "dictionary": method_settings(found.fitted),
        "data": made.get("data"),
    }
    chosen = set(original.rows.column("selector").unique().to_pylist())
    positions = {name: rule for name, rule in (made.get("selectors") or {}).items() if name in chosen}

    def vector(values: Tensor, name: str, **more: Any) -> SteeringVector:
        owner = {part: made.get(part) for part in ("model", "revision", "adapter")}
        return SteeringVector(values, hook, "shift", name, positions, made_from={**about, **more}, **owner)

    kept = [vector(shifts.overall, "all concepts", rows=len(found.original.main))]
    for number, count in enumerate(shifts.counts.tolist()):
        if count:
            own = ", ".join(words[number][:3]) if words else ""
            name = f"concept {found.label(number)}{f': {own}' if own else ''}"
            consistency = float(shifts.pairwise[number])
            kept.append(
                vector(
                    shifts.vectors[number],
                    name,
                    concept=found.label(number),
                    number=number,
                    concepts=found.k,
                    rows=count,
                    # JSON has no NaN, which a single row's consistency is.
                    consistency=consistency if np.isfinite(consistency) else None,
                )
            )
    return kept
