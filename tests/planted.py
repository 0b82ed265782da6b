"""Dictionaries whose concepts are known, for what needs one without a fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary


class Planted(Decomposition):
    """Activations are the products with given directions: their positive part, or signed as PCA's are."""

    def __init__(self, signed: bool = False) -> None:
        self.signed = signed

    def transform(self, X: Tensor | np.ndarray) -> Tensor:
        """(X - mean) C^T."""
        found = (torch.as_tensor(X).float() - self.mean_) @ self.components_.T
        return found if self.signed else found.clamp_min(0)


def planted(directions: Any, mean: Any = None, signed: bool = False) -> Planted:
    """A fitted decomposition with these directions (k, d), made rows of norm 1."""
    made = Planted(signed)
    rows = torch.as_tensor(np.asarray(directions), dtype=torch.float32)
    made.components_ = torch.nn.functional.normalize(rows, dim=1)
    made.mean_ = torch.zeros(rows.shape[1]) if mean is None else torch.as_tensor(np.asarray(mean), dtype=torch.float32)
    return made


def dictionary(hook: str, directions: Any, mean: Any = None, signed: bool = False, **made_by: Any) -> ConceptDictionary:
    """A dictionary with these directions."""
    return ConceptDictionary(planted(directions, mean, signed), hook, made_by)
