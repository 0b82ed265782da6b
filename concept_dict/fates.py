"""What became of concepts: kept, specialised or new in the fine-tuned model, or lost (arXiv 2501.03012, section 4.1).

Whether two concepts are the same is judged by what the same model does without fine-tuning: the original's concepts,
found again on other samples, come back with cosines below 1 too.

| fate | of a concept of | largest cosine with a concept of the other model |
|---|---|---|
| kept | the fine-tuned model | as large as those of the original with itself, found again (all but the lowest 5 %) |
| specialised | the fine-tuned model | between |
| new | the fine-tuned model | below `apart`, 1/2 unless told: it points elsewhere than anything did |
| lost | the original | below `apart` |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from concept_dict.quality import cosines
from concept_dict.recovery import Concepts
from hooked_mm.errors import BadInputError

FATES = ("kept", "specialised", "new")


@dataclass(frozen=True)
class Fates:
    """Per concept of the fine-tuned model its nearest of the original, the cosine, and what became of it.

    Attributes:
        nearest: A concept of the original that has a place; several may share one. -1 without a place of one's own.
        cosine: With it; NaN without.
        fate: One of `FATES`; empty for concepts without a place.
        lost: Concepts of the original that nothing is left of.
        same: The cosine from which on two concepts are the same.
        apart: The one below which they have little to do with each other.
    """

    nearest: Int[np.ndarray, " k"]
    cosine: Float[np.ndarray, " k"]
    fate: list[str]
    lost: list[int]
    same: float
    apart: float

    def count(self, fate: str) -> int:
        """How many concepts of the fine-tuned model have the fate."""
        return self.fate.count(fate)


ROUNDING = 1e-6
"""By how much a cosine of directions in float32 may be off."""


def fates(original: Concepts, again: Concepts, tuned: Concepts, apart: float = 0.5) -> Fates:
    """What became of each concept.

    Args:
        original: Of the original model.
        again: Of the original model, found on other samples: those that the fine-tuned model's were found on.
        tuned: Of the fine-tuned model.
        apart: See the table above; `same` is never below it.

    Raises:
        BadInputError: If `apart` is no cosine, or no concept of the original has a place.
    """
    if not -1 <= apart <= 1:
        raise BadInputError(f"apart={apart}; it is a cosine, from -1 to 1")
    theirs, mine, back = (np.flatnonzero((side.sizes > 0).numpy()) for side in (tuned, original, again))
    if not len(mine):
        raise BadInputError("no concept of the original has rows; give rows that activate them")
    found = cosines(again.vectors[back], original.vectors[mine]).max(axis=1)
    same = max(apart, float(np.percentile(found, 5))) if len(found) else 1.0
    between = cosines(tuned.vectors[theirs], original.vectors[mine])
    largest = between.max(axis=1)
    nearest, cosine = np.full(len(tuned.sizes), -1), np.full(len(tuned.sizes), np.nan)
    nearest[theirs], cosine[theirs] = mine[between.argmax(axis=1)], largest
    fate = [""] * len(tuned.sizes)
    for number, value in zip(theirs, largest, strict=True):
        fate[number] = "kept" if value >= same - ROUNDING else "new" if value < apart else "specialised"
    # Without any concept of the fine-tuned model all are lost.
    lost = mine[between.max(axis=0, initial=-1.0) < apart]
    return Fates(nearest, cosine, fate, lost.tolist(), same, apart)
