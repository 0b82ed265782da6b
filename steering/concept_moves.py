"""A vector for every concept: each position is moved by that of the concept it activates most.

    x' = x + a v_k,    k the main concept of x

One vector makes one and the same push everywhere. What shall be said otherwise word by word (another style, say) takes
another push at every step, and the concept of a position tells which: the shifts between a model and its fine-tuned
sibling (`concept_dict.shift`), or whatever else there is a vector per concept of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary
from concept_dict.shift import main_concept, movements, shift_vectors
from concept_dict.shift_steering import ShiftConcepts
from hooked_mm.errors import BadInputError
from hooked_mm.positions import At
from hooked_mm.steering_vector import SteeringVector
from steering.controls import random_like


@dataclass(frozen=True, eq=False)
class ConceptMoves:
    """A vector for every concept of a dictionary.

    Attributes:
        hook: The point of the dictionary's rows.
        fitted: The dictionary.
        vectors: One per concept; zeros leave a concept's positions alone.
        name: For people.
        kind: `"moves"`, or which control it is.

    Raises:
        BadInputError: As `ShiftConcepts`, if there is not one vector per concept.
    """

    hook: str
    fitted: Decomposition
    vectors: Float[Tensor, "k d"]
    name: str = ""
    kind: str = "moves"

    def __post_init__(self) -> None:
        self.intervention()

    @classmethod
    def of_pairs(
        cls,
        source: Float[Tensor, "n d"],
        target: Float[Tensor, "n d"],
        fitted: Decomposition,
        hook: str,
        name: str = "",
    ) -> Self:
        """Mean movements of paired rows, over the rows of each concept; a concept without rows stays where it is.

        Args:
            source: Rows of the model as it is.
            target: The same rows as they shall become: of a fine-tuned sibling that reads the same.
            fitted: A dictionary of the source's rows.
            hook: The point of the rows.
            name: For people.

        Raises:
            BadInputError: If the rows are not paired.
        """
        if source.shape != target.shape or source.ndim != 2 or not len(source):
            raise BadInputError(
                f"source rows {tuple(source.shape)}, target rows {tuple(target.shape)}; give (n, d) of both, in pairs"
            )
        active = fitted.transform(source)
        shifts = shift_vectors(movements(source, target), main_concept(active), active.shape[1])
        return cls(hook, fitted, shifts.vectors.nan_to_num(0.0), name)

    @classmethod
    def load(cls, folder: str | Path, dictionary: ConceptDictionary | None = None, name: str = "") -> Self:
        """The shifts of a study that `hooked-mm shift` has kept; see `ShiftConcepts.load`."""
        kept = ShiftConcepts.load(folder, dictionary)
        assert isinstance(kept.point, str)
        return cls(kept.point, kept.fitted, kept.vectors, name or Path(folder).name)

    @property
    def layer(self) -> int | None:
        """The block of its hook, None outside blocks."""
        return SteeringVector(self.vectors[0], self.hook).layer

    def intervention(self, alpha: float = 1.0, at: At = "generated") -> ShiftConcepts:
        """What moves positions by alpha times the vector of their concept."""
        return ShiftConcepts(self.hook, self.fitted, self.vectors, alpha, at=at)

    def controls(self, seeds: Sequence[int] = (0,)) -> list[Self]:
        """Per seed two of the same dictionary: random vectors each as long as the true one (`"random"`), and the true
        vectors dealt to other concepts (`"shuffled"`)."""
        found = []
        for seed in seeds:
            chance = torch.Generator().manual_seed(seed)
            drawn = [random_like(v, int(torch.randint(2**31, (), generator=chance))) for v in self.vectors]
            # Turned by some places along a random order, no concept keeps its own.
            order = torch.randperm(len(self.vectors), generator=chance)
            dealt = torch.empty_like(self.vectors)
            dealt[order] = self.vectors[order.roll(1)]
            for kind, vectors in (("random", torch.stack(drawn)), ("shuffled", dealt)):
                found.append(replace(self, vectors=vectors, kind=kind, name=f"{kind} for {self.name}, seed {seed}"))
        return found

    @property
    def values(self) -> Float[Tensor, " n"]:
        """All its numbers: the vectors', and those that say which concept a position has."""
        return torch.cat([self.vectors.flatten().cpu(), self.fitted.components_.flatten().cpu()])
