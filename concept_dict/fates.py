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
from torch import Tensor
from torch.nn.functional import normalize

from concept_dict.recovery import Concepts
from hooked_mm.errors import BadInputError

FATES = ("kept", "specialised", "new")


@dataclass(frozen=True)
class Fates:
    """Per concept of the fine-tuned model its nearest of the original, the cosine, and what became of it.

    Attributes:
        nearest: A concept of the original; several may share one.
        cosine: With it.
        fate: One of `FATES`; empty for concepts without rows.
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


def cosines(one: Tensor, other: Tensor) -> Float[np.ndarray, "k m"]:
    """Between directions; 0 with one of length 0."""
    return (normalize(one.double()) @ normalize(other.double()).T).numpy()


def fates(original: Concepts, again: Concepts, tuned: Concepts, apart: float = 0.5) -> Fates:
    """What became of each concept.

    Args:
        original: Of the original model.
        again: Of the original model, found on other samples: those that the fine-tuned model's were found on.
        tuned: Of the fine-tuned model.
        apart: See the table above; `same` is never below it.

    Raises:
        BadInputError: If `apart` is no cosine.
    """
    if not -1 <= apart <= 1:
        raise BadInputError(f"apart={apart}; it is a cosine, from -1 to 1")
    present = (again.sizes != 0).numpy()
    back = cosines(again.vectors, original.vectors).max(axis=1)[present]
    same = max(apart, float(np.percentile(back, 5))) if len(back) else 1.0
    between = cosines(tuned.vectors, original.vectors)
    nearest, largest = between.argmax(axis=1), between.max(axis=1)
    present = (tuned.sizes != 0).numpy()
    fate = [
        "" if not there else "kept" if cosine >= same else "new" if cosine < apart else "specialised"
        for there, cosine in zip(present, largest, strict=True)
    ]
    alive = (original.sizes != 0).numpy()
    lost = [int(k) for k in np.flatnonzero(alive & (between.max(axis=0) < apart))]
    return Fates(nearest, largest, fate, lost, same, apart)
