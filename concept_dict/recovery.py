"""How well moving a concept of the original recovers one of the fine-tuned model (arXiv 2501.03012, section 3.2).

A concept has a place in the space of rows: u_k = mean + s_k c_k, where s_k is how far its rows lie along it on average.
Moved, it is u_k + alpha Delta_k. What is compared are directions: of the fine-tuned model's concepts from that model's
mean, of moved ones from the same mean, of the original's own from the original's mean (of dictionaries that are not
centred, means are 0). Partners are found once, for concepts that were not moved: matching again behind the move would
prefer whatever moved towards anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from concept_dict.metrics import poles, pool_samples
from concept_dict.quality import Fitted, cosines, folded
from concept_dict.shift import Average, Shifts, main_concept, shift_vectors
from hooked_mm.errors import BadInputError

CONTROLS = ("unshifted", "global", "random groups", "random direction", "another's")
FORMS = {
    "unshifted": "as the original has it",
    "global": "moved by one mean shift for all: what a common drift explains",
    "random groups": "moved by the mean over rows that were dealt to groups of the same sizes: averaging over few rows",
    "random direction": "moved by a random vector as long as its own shift: the length of the move",
    "another's": "moved by the shift of another concept: shifts that are alike",
    "shifted": "moved by its own shift",
    "refitted": "the fine-tuned model's own concept, found on other samples: how well any come back",
}
"""The forms of a concept that are scored."""
SCORES = {
    "cosine": "with the matched concept of the fine-tuned model",
    "distance": "to it, in the rows' units: lower is better",
    "words": "T-overlap: share of the matched concept's top words that are among the form's",
    "samples": "overlap of the most activating samples, likewise",
    "explained": "1 - ||delta - move||^2 / ||delta||^2 over the concept's held-out rows",
    "row_cosine": "of held-out rows, moved, with what the fine-tuned model makes of them",
}
"""What every form of a concept is scored by; `refitted`, which moves nothing, has no `explained` and `row_cosine`."""

Words = Callable[[Tensor], Sequence[Collection[str]]]
"""Directions (k, d) -> the top words of each."""


@dataclass(frozen=True)
class Concepts:
    """Concepts with their places.

    Attributes:
        directions: c_k, of norm 1; of signed methods C and then -C.
        mean: What directions start from.
        sizes: s_k, mean over the concept's rows of (z - mean) . c_k; 0 without rows, and where the mean is negative, as
            it can be with concepts that point against each other: rows that lie behind a concept give it no place.
        main: The concept of each row they were placed by, see `shift.main_concept`.
    """

    directions: Float[Tensor, "k d"]
    mean: Float[Tensor, " d"]
    sizes: Float[Tensor, " k"]
    main: Int[Tensor, " n"]

    @classmethod
    def of(cls, fitted: Fitted, rows: Float[Tensor, "n d"], signed: bool = False) -> Concepts:
        """A dictionary's concepts, placed by rows; `signed`: both ends of each are concepts of their own."""
        activations = fitted.transform(rows.float())
        directions = fitted.components_.float().cpu()
        if signed:
            activations, directions = poles(activations), torch.cat([directions, -directions])
        main = main_concept(activations).cpu()
        mean = fitted.mean_.float().cpu()
        along = ((rows.float().cpu() - mean) * directions[main]).sum(dim=1, dtype=torch.float64)
        kept = main >= 0
        total = torch.zeros(len(directions), dtype=torch.float64).index_add_(0, main[kept], along[kept])
        counts = torch.bincount(main[kept], minlength=len(directions))
        return cls(directions, mean, (total / counts.clamp_min(1)).clamp_min(0).float(), main)

    @property
    def vectors(self) -> Float[Tensor, "k d"]:
        """s_k c_k: places from the mean."""
        return self.directions * self.sizes[:, None]

    @property
    def points(self) -> Float[Tensor, "k d"]:
        """u_k = mean + s_k c_k."""
        return self.mean + self.vectors

    def moved(self, move: Float[Tensor, "k d"] | None, tuned: Concepts) -> Float[Tensor, "k d"]:
        """u_k + move from the fine-tuned model's mean; None: as they are, from their own."""
        # Means first: where both are the same, no rounding is left of them.
        return self.vectors if move is None else self.vectors + (self.mean - tuned.mean) + move


def match(original: Concepts, tuned: Concepts) -> Int[np.ndarray, " k"]:
    """Per concept of the original its partner: the assignment with the largest sum of cosines (the Hungarian method).

    -1 for concepts without a place (of size 0), and for those that are left where the fine-tuned model has fewer.
    """
    found = np.full(len(original.directions), -1)
    rows, columns = ((side.sizes != 0).numpy().nonzero()[0] for side in (original, tuned))
    if len(rows) and len(columns):
        one, other = linear_sum_assignment(cosines(original.vectors[rows], tuned.vectors[columns]), maximize=True)
        found[rows[one]] = columns[other]
    return found


def moves(
    shifts: Shifts,
    deltas: Float[Tensor, "n d"],
    concept: Int[Tensor, " n"],
    alpha: float = 1.0,
    draws: int = 5,
    seed: int = 0,
    how: Average = "mean",
    trim: float = 0.1,
) -> dict[str, list[Float[Tensor, "k d"] | None]]:
    """By form, what concepts are moved by (see `FORMS`): one draw, or `draws` of those that are drawn.

    Args:
        shifts: Of the concepts.
        deltas: What they are the averages of.
        concept: Of each row, see `shift.shift_vectors`.
        alpha: By what every move is multiplied.
        draws: Of each random control.
        seed: Of the draws.
        how: What average the shifts are, see `shift.average`; that of random groups is the same.
        trim: See `shift.average`.

    Raises:
        BadInputError: Without draws.
    """
    if draws < 1:
        raise BadInputError(f"draws={draws}; random controls need at least one")
    drawn = torch.Generator().manual_seed(seed)
    k = len(shifts.vectors)
    found: dict[str, list[Tensor | None]] = {form: [] for form in (*CONTROLS, "shifted")}
    found["unshifted"].append(None)
    found["global"].append(alpha * shifts.overall.expand(k, -1))
    found["shifted"].append(alpha * shifts.vectors)
    for _ in range(draws):
        dealt = concept[torch.randperm(len(concept), generator=drawn)]
        found["random groups"].append(alpha * shift_vectors(deltas, dealt, k, how, trim).vectors)
        random = normalize(torch.randn(shifts.vectors.shape, generator=drawn))
        found["random direction"].append(alpha * random * shifts.magnitude[:, None])
        found["another's"].append(alpha * shifts.vectors[_others(shifts.counts > 0, drawn)])
    return found


def _others(present: Tensor, drawn: torch.Generator) -> Int[Tensor, " k"]:
    """Per concept another one that has rows, by chance; itself if there is none."""
    options = present.nonzero()[:, 0]
    chosen = torch.arange(len(present))
    for number in range(len(present)):
        others = options[options != number]
        if len(others):
            chosen[number] = others[torch.randint(len(others), (1,), generator=drawn)]
    return chosen


@dataclass(frozen=True)
class HeldOut:
    """Rows that computed neither shifts nor the original's dictionary, in pairs.

    `concept` is the original's main concept of each; `sample` numbers the samples they come from, from 0.
    """

    original: Float[Tensor, "n d"]
    tuned: Float[Tensor, "n d"]
    concept: Int[Tensor, " n"]
    sample: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Recovery:
    """Scores of every form of every concept.

    Attributes:
        partner: The matched concept of the fine-tuned model, -1 for none.
        counts: Rows that Delta_k is the mean of.
        held_out: Held-out rows of the concept.
        scores: Form -> score (see `SCORES`) -> per concept; NaN without a partner, and where there is nothing to score.
    """

    partner: Int[np.ndarray, " k"]
    counts: Int[np.ndarray, " k"]
    held_out: Int[np.ndarray, " k"]
    scores: Mapping[str, Mapping[str, Float[np.ndarray, " k"]]]


def share(wanted: Collection[str | int], found: Collection[str | int]) -> float:
    """|wanted n found| / |wanted|, whatever the case of words; NaN where nothing is wanted."""
    one, other = folded(wanted), folded(found)
    return len(one & other) / len(one) if one else float("nan")


def along(
    directions: Float[Tensor, "k d"], rows: Float[Tensor, "n d"], sample: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " samples"], Float[np.ndarray, "samples k"]]:
    """The samples that rows come from, ascending, and how far the farthest row of each lies along every direction.

    Numbers of samples may have gaps: a sample without rows is nowhere.
    """
    present, dense = np.unique(sample, return_inverse=True)
    return present, pool_samples(rows @ normalize(directions).T, dense, len(present))


def top_by_direction(
    directions: Float[Tensor, "k d"], rows: Float[Tensor, "n d"], sample: Int[np.ndarray, " n"], count: int
) -> list[list[int]]:
    """Per direction the samples with the row that lies farthest along it; no method's own activations are needed.

    Of equals those with smaller numbers; numbers without rows are no samples. All, if there are no more than `count`.
    """
    present, pooled = along(directions, rows, sample)
    order = np.argsort(-pooled, axis=0, kind="stable")[:count]
    return [present[column].tolist() for column in order.T]


def recover(
    original: Concepts,
    tuned: Concepts,
    shifts: Shifts,
    moved: Mapping[str, Sequence[Float[Tensor, "k d"] | None]],
    held: HeldOut,
    *,
    refitted: Concepts | None = None,
    words: tuple[Words, Words] | None = None,
    samples: int = 10,
) -> Recovery:
    """Score every form of the original's concepts against their partners among the fine-tuned model's.

    Args:
        original: The concepts that are moved.
        tuned: Those to recover.
        shifts: Of the original's.
        moved: What forms are moved by, see `moves`.
        held: Rows that scores are measured on.
        refitted: The fine-tuned model's concepts, found on other samples than `tuned`.
        words: What directions decode to in the original, for concepts that were not moved, and in the fine-tuned model.
        samples: Most activating samples that are compared.

    Raises:
        BadInputError: If no sample is to be compared.
    """
    if samples < 1:
        raise BadInputError(f"samples={samples}; compare at least one most activating sample")
    partner = match(original, tuned)
    target = tuned.vectors[partner]
    here, there = (rows.float() - side.mean for rows, side in ((held.original, original), (held.tuned, tuned)))
    wanted_words = words[1](target) if words else []
    wanted = top_by_direction(target, there, held.sample, samples)

    def scored(directions: Tensor, at_home: bool) -> dict[str, np.ndarray]:
        found = {
            "cosine": cosine_similarity(directions.double(), target.double(), dim=1).numpy(),
            "distance": (directions.double() - target.double()).norm(dim=1).numpy(),
            "samples": _shares(wanted, top_by_direction(directions, here if at_home else there, held.sample, samples)),
        }
        return {**found, "words": _shares(wanted_words, words[1 - at_home](directions))} if words else found

    found: dict[str, dict[str, np.ndarray]] = {}
    for form, translations in moved.items():
        draws = [
            {**scored(original.moved(move, tuned), move is None), **_on_rows(move, original, tuned, held)}
            for move in translations
        ]
        found[form] = {name: np.mean([draw[name] for draw in draws], axis=0) for name in draws[0]}
    if refitted is not None:
        of = match(tuned, refitted)[partner]
        found["refitted"] = scored(refitted.vectors[of], False)
        partnerless = (partner < 0) | (of < 0)
        found["refitted"] = {name: np.where(partnerless, np.nan, own) for name, own in found["refitted"].items()}
    known = {form: {n: np.where(partner < 0, np.nan, own) for n, own in s.items()} for form, s in found.items()}
    held_out = torch.bincount(held.concept[held.concept >= 0], minlength=len(partner)).numpy()
    return Recovery(partner, shifts.counts.numpy(), held_out, known)


def _shares(wanted: Sequence[Collection], found: Sequence[Collection]) -> Float[np.ndarray, " k"]:
    return np.array([share(*pair) for pair in zip(wanted, found, strict=True)])


def _on_rows(
    move: Float[Tensor, "k d"] | None, original: Concepts, tuned: Concepts, held: HeldOut
) -> dict[str, Float[np.ndarray, " k"]]:
    """How well each concept's move foretells what the fine-tuning does to its held-out rows."""
    k = len(original.directions)
    explained, cosine = np.full(k, np.nan), np.full(k, np.nan)
    for number in range(k):
        mine = held.concept == number
        if not bool(mine.any()):
            continue
        before, after = held.original[mine].double(), held.tuned[mine].double()
        by = torch.zeros(before.shape[1], dtype=torch.float64) if move is None else move[number].double()
        left, size = (after - before - by).square().sum(), (after - before).square().sum()
        # Of rows that did not move at all everything is explained by no move.
        explained[number] = float(1 - left / size) if size > 0 else float(left == 0)
        start = original.mean if move is None else tuned.mean
        cosine[number] = float(cosine_similarity(before + by - start, after - tuned.mean, dim=1).mean())
    return {"explained": explained, "row_cosine": cosine}
