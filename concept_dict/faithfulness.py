"""Do concepts carry what the model says? They are deleted from, or inserted into, the residual stream, and it is asked.

At a position that predicts a token of the answer, with representation z ~ mean + sum_k a_k c_k:

    deletion of m concepts    z - sum of their a_k c_k          (m = 0: the model as it is)
    insertion of m concepts   mean + sum of their a_k c_k       (m = 0: the mean instead of z)

and the log-probability of that token is measured for m = 0, 1, ... The strongest concepts (largest |a|) are taken
first; beside them stand the same concepts in random order, and the strongest of a random dictionary of the same size.
After insertion and deletion games for pixels (Petsiuk, Das, Saenko 2018, RISE, arXiv 1806.07421, section 4.3). Each row
is changed in a pass of its own sample, so other rows of a sample stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from concept_dict.answer_rows import AnswerRows, Asked, asked
from concept_dict.quality import Fitted
from concept_dict.random_dictionary import RandomDictionary
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add, Intervention, Replace
from hooked_mm.positions import PositionRule
from hooked_mm.value_layout import Layout

Mode = Literal["delete", "insert"]
MODES: tuple[Mode, ...] = ("delete", "insert")


@dataclass(frozen=True)
class Curve:
    """Log-probabilities of the answers' tokens while concepts are deleted or inserted.

    Attributes:
        steps: Numbers of concepts m, rising.
        values: Natural logarithms, one row per position.
        own: Those of the model left alone.
    """

    steps: Int[np.ndarray, " s"]
    values: Float[np.ndarray, "r s"]
    own: Float[np.ndarray, " r"]

    @property
    def mean(self) -> Float[np.ndarray, " s"]:
        """The mean over rows, for every m."""
        return self.values.mean(axis=0)

    @property
    def areas(self) -> Float[np.ndarray, " r"]:
        """Per row, the change of log-probability averaged over m (trapezoids): 0 if nothing changes.

        For deletion the lower the more faithful, for insertion the higher (the nearer to 0).
        """
        change = self.values - self.own[:, None]
        if len(self.steps) == 1:
            return change[:, 0]
        return np.trapezoid(change, self.steps, axis=1) / (self.steps[-1] - self.steps[0])

    @property
    def area(self) -> float:
        """The mean of `areas`."""
        return float(self.areas.mean())


@dataclass(frozen=True, eq=False, repr=False)
class _OnePerSample(PositionRule):
    """One column of every sample, -1 for none."""

    columns: Int[Tensor, " samples"]

    def mask(self, layout: Layout) -> Bool[Tensor, "r p"]:
        wanted = layout.pick(self.columns, "positions")
        return torch.arange(layout.shape[1], device=wanted.device) == wanted


def _log_probabilities(logits: Float[Tensor, "b p v"], places: Asked, chosen: Int[Tensor, " m"]) -> Tensor:
    """Of the rows' tokens; logits may be those of the last positions only."""
    length = places.batch.length
    picked = logits[places.sample[chosen], places.column[chosen] - length].float().cpu()
    return picked.log_softmax(dim=-1).gather(1, places.token[chosen, None])[:, 0]


@torch.no_grad()
def _own(model: HookedMM, hook: str, places: Asked) -> tuple[Float[Tensor, "r d"], Float[Tensor, " r"]]:
    """The rows' representations, float32, and the model's own log-probabilities."""
    logits, cache = model.run_with_cache(places.batch, hook)
    assert logits is not None  # no stop was asked for
    values = cache[hook][places.sample, places.column].float()
    return values, _log_probabilities(logits, places, torch.arange(len(places.sample)))


def _waves(samples: Int[Tensor, " r"]) -> list[list[int]]:
    """AnswerRows in groups that hold every sample at most once."""
    waves: list[list[int]] = []
    turn: Counter[int] = Counter()
    for row, sample in enumerate(samples.tolist()):
        if turn[sample] == len(waves):
            waves.append([])
        waves[turn[sample]].append(row)
        turn[sample] += 1
    return waves


@torch.no_grad()
def _changed(model: HookedMM, hook: str, places: Asked, vectors: Float[Tensor, "r d"], mode: Mode) -> Tensor:
    """Log-probabilities with the vectors subtracted from the rows, or put in their place."""
    found = torch.empty(len(places.sample))
    for rows in map(torch.tensor, _waves(places.sample)):
        samples, size = places.sample[rows], len(places.batch)
        columns = torch.full((size,), -1)
        columns[samples] = places.column[rows]
        spread = vectors.new_zeros(size, vectors.shape[1])
        spread[samples] = vectors[rows]
        rule = _OnePerSample(columns.to(places.batch.modality.device))
        change: Intervention = Add(hook, -spread, at=rule) if mode == "delete" else Replace(hook, spread, at=rule)
        keep = places.batch.length - int(places.column[rows].min())
        logits = model.run_with_hooks(places.batch, [change], logits_to_keep=keep)
        assert logits is not None  # no stop was asked for
        found[rows] = _log_probabilities(logits, places, rows)
    return found


def strongest_first(activations: Float[Tensor, "r k"]) -> Int[Tensor, "r k"]:
    """Concepts of every row by falling |a|, ties in their own order."""
    return (-activations.abs()).argsort(dim=1, stable=True)


def random_order(activations: Float[Tensor, "r k"], rng: np.random.Generator) -> Int[Tensor, "r k"]:
    """The active concepts of every row in random order, then the others, which would change nothing."""
    keys = torch.as_tensor(rng.random(tuple(activations.shape)), device=activations.device)
    return torch.where(activations == 0, 2 + keys, keys).argsort(dim=1)


def first_terms(
    activations: Float[Tensor, "r k"], concepts: Float[Tensor, "k d"], order: Int[Tensor, "r k"], count: int
) -> Float[Tensor, "r d"]:
    """Per row, the sum of a_k c_k over the first `count` concepts of its order."""
    kept = torch.zeros_like(activations).scatter(1, order[:, :count], 1.0)
    return (activations * kept).float() @ concepts.float()


def curve(
    model: HookedMM,
    hook: str,
    rows: AnswerRows,
    activations: Float[Tensor, "r k"],
    dictionary: Fitted,
    order: Int[Tensor, "r k"],
    steps: Sequence[int],
    mode: Mode,
) -> Float[np.ndarray, "r s"]:
    """Log-probabilities of the rows' tokens for every number of concepts in `steps`.

    Args:
        model: The model whose representations the dictionary explains.
        hook: A (batch, pos, d) point of the language model.
        rows: The positions.
        activations: Of the rows.
        dictionary: Its concepts and its mean.
        order: Per row, its concepts, those to be taken first in front.
        steps: Numbers of concepts.
        mode: `"delete"` or `"insert"`.

    Raises:
        BadInputError: For a position that predicts nothing, a mode or a number of concepts that there is not.
    """
    if mode not in MODES:
        raise BadInputError(f"mode={mode!r}; it must be 'delete' or 'insert'")
    k = len(dictionary.components_)
    if not all(0 <= step <= k for step in steps):
        raise BadInputError(f"steps={list(steps)} of a dictionary of {k} concepts; take numbers from 0 to {k}")
    places, found = asked(rows), []
    for step in steps:
        vectors = first_terms(activations, dictionary.components_, order, step)
        vectors = vectors if mode == "delete" else dictionary.mean_.float() + vectors
        found.append(_changed(model, hook, places, vectors, mode).numpy())
    return np.stack(found, axis=1)


def faithfulness(
    model: HookedMM,
    hook: str,
    dictionary: Fitted,
    batches: Iterable[AnswerRows],
    *,
    steps: Sequence[int] | None = None,
    signed: bool = False,
    seed: int = 0,
) -> dict[str, Curve]:
    """Deletion and insertion curves beside those of random orders and of a random dictionary.

    Args:
        model: The model whose representations the dictionary explains.
        hook: Where: a (batch, pos, d) point of the language model, the dictionary's.
        dictionary: Fitted.
        batches: AnswerRows to measure at, batch by batch; see `answer_rows.stored_rows`.
        steps: Numbers of concepts m; 0 to 10 (or to k, if there are fewer) unless given.
        signed: Whether the dictionary's activations can be negative; the random dictionary's then can, too.
        seed: Of random orders and the random dictionary.

    Returns:
        `delete`, `delete_random_order`, `delete_random_dictionary`, and the same three with `insert`.

    Raises:
        BadInputError: As `curve`; and without any rows.
    """
    taken = list(range(min(10, len(dictionary.components_)) + 1)) if steps is None else sorted(set(steps))
    if not taken:
        raise BadInputError("steps is empty; give numbers of concepts, for instance range(11)")
    rng, other = np.random.default_rng(seed), RandomDictionary.like(dictionary, signed=signed, seed=seed)
    own: list[np.ndarray] = []
    parts: dict[str, list[np.ndarray]] = {}
    for rows in tqdm(batches, desc="faithfulness", delay=2, leave=False):
        if not len(rows.sample):
            continue
        values, alone = _own(model, hook, asked(rows))
        own.append(alone.numpy())
        values = values.to(dictionary.mean_.device)
        mine, theirs = dictionary.transform(values), other.transform(values)
        variants: list[tuple[str, Fitted, Tensor, Tensor]] = [
            ("", dictionary, mine, strongest_first(mine)),
            ("_random_order", dictionary, mine, random_order(mine, rng)),
            ("_random_dictionary", other, theirs, strongest_first(theirs)),
        ]
        for mode in MODES:
            for name, made, activations, order in variants:
                found = curve(model, hook, rows, activations, made, order, taken, mode)
                parts.setdefault(mode + name, []).append(found)
    if not own:
        raise BadInputError("there are no rows to measure faithfulness at; give positions that predict an answer")
    alone_all, numbers = np.concatenate(own), np.array(taken)
    return {name: Curve(numbers, np.concatenate(found), alone_all) for name, found in parts.items()}
