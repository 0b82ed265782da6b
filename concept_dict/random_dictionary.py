"""The dictionary that any other has to beat: random directions, with the best activations that they allow.

Its rows are represented as well as random concepts can, so whatever another dictionary does better is due to its
concepts: by non-negative least squares, or by least squares where the other's activations are signed as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from concept_dict.metrics import random_concepts
from concept_dict.nnls import nonnegative_least_squares
from concept_dict.quality import CHUNK, Fitted


@dataclass(frozen=True)
class RandomDictionary:
    """Random unit concepts around a mean.

    Attributes:
        components_: C (k, d), rows of norm 1.
        mean_: (d,), subtracted from the rows first.
        signed: Whether activations may be negative.
    """

    components_: Float[Tensor, "k d"]
    mean_: Float[Tensor, " d"]
    signed: bool = False

    @classmethod
    def like(cls, dictionary: Fitted, *, signed: bool = False, seed: int = 0) -> RandomDictionary:
        """As many concepts as another dictionary has, around the same mean."""
        k, d = dictionary.components_.shape
        mean = dictionary.mean_
        return cls(random_concepts(k, d, seed).to(mean.device), mean, signed)

    def transform(self, X: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Activations A (n, k) minimising ||Z - mean - A C||; where several do, signed ones are the smallest."""
        wide = self.components_.double()
        parts = []
        for start in range(0, len(X), CHUNK):
            rows = torch.as_tensor(X[start : start + CHUNK]).double() - self.mean_.double()
            if self.signed:
                parts.append((rows @ torch.linalg.pinv(wide)).float())
            else:
                parts.append(nonnegative_least_squares(rows @ wide.T, wide @ wide.T))
        return torch.cat(parts) if parts else wide.new_zeros(0, len(wide), dtype=torch.float32)
