"""Shifts put into the original model while it speaks: every position is moved as its own concept was.

    x' = x + alpha Delta_k,    k the main concept of x

What this changes in the model's words is what shifts *do*, which no score of directions tells: a fine-tuning that is a
translation per concept is then repeated by the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary
from concept_dict.metrics import poles
from concept_dict.shift import main_concept
from concept_dict.shift_study import ShiftStudy
from hooked_mm.errors import BadInputError
from hooked_mm.first_change import position_wise
from hooked_mm.interventions import AtPoint
from hooked_mm.positions import ALL, At
from hooked_mm.steering_vector import load_vectors
from hooked_mm.vectors import Spread, checked


@position_wise
@dataclass(frozen=True, eq=False, repr=False)
class ShiftConcepts(AtPoint):
    """x + alpha Delta_k, k the main concept of x; a position that activates no concept stays as it is.

    Attributes:
        fitted: The original's dictionary, of the rows of the same point.
        vectors: Delta_k of its k concepts, or of both ends of signed ones (2k).
        alpha: How much.

    Raises:
        BadInputError: If there is not one vector per concept, or per end.
    """

    fitted: Decomposition
    vectors: Float[Tensor, "k d"]
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        vectors = checked("vectors", self.vectors, (2,))
        k, d = self.fitted.components_.shape
        if tuple(vectors.shape) not in ((k, d), (2 * k, d)):
            raise BadInputError(
                f"vectors have shape {tuple(vectors.shape)}, the dictionary's concepts {(k, d)}; give a vector per "
                "concept, or two where both ends are told apart"
            )
        object.__setattr__(self, "vectors", vectors)

    @classmethod
    def of(cls, study: ShiftStudy, hook: str, alpha: float = 1.0, at: At = ALL) -> Self:
        """The shifts of a study, at the hook point of its rows."""
        return cls(hook, study.fitted, study.shifts.vectors, alpha, at=at)

    @classmethod
    def load(
        cls, folder: str | Path, dictionary: ConceptDictionary | None = None, alpha: float = 1.0, at: At = ALL
    ) -> Self:
        """The shifts of a study that `hooked-mm shift` has kept; concepts without rows are not moved.

        Args:
            folder: Of the study, such as `runs/shift/KMeans-k20`.
            dictionary: The original's, where it was given to the command and so does not lie in the folder.
            alpha: How much.
            at: Which positions.

        Raises:
            BadInputError: If the folder holds no dictionary or no shift vectors of concepts.
        """
        owner = dictionary if dictionary is not None else ConceptDictionary.load(Path(folder) / "dictionary")
        kept = [vector for vector in load_vectors(Path(folder) / "vectors") if "number" in vector.made_from]
        if not kept:
            raise BadInputError(
                f"{str(folder)!r} holds no shift vectors of concepts; give a study of `hooked-mm shift`"
            )
        vectors = torch.zeros(kept[0].made_from["concepts"], len(kept[0].values))
        for vector in kept:
            vectors[vector.made_from["number"]] = vector.values
        return cls(kept[0].hook, owner.decomposition, vectors, alpha, at=at)

    def change(self, spread: Spread) -> Tensor:
        """x + alpha Delta_k."""
        value = spread.value
        rows = value.detach().reshape(-1, value.shape[-1]).to(self.fitted.components_.device, torch.float32)
        activations = self.fitted.transform(rows)
        both = len(self.vectors) > activations.shape[1]
        concept = main_concept(poles(activations) if both else activations).to(self.vectors.device)
        moves = torch.where((concept >= 0)[:, None], self.vectors[concept], 0.0)
        return value + self.alpha * moves.reshape(value.shape).to(value)
