"""Principal components as concepts: the orthonormal directions of largest variance, with activations of either sign.

Minimises ||Z - mean - A C||_F^2 over C C^T = I; A = (Z - mean) C^T. Needs of the rows only Z^T Z (d, d).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.rows import Centred, Rows, second_moments
from hooked_mm.errors import BadInputError


def principal_directions(rows: Centred, count: int) -> tuple[Float[Tensor, "count d"], Float[Tensor, " count"]]:
    """Leading eigenvectors of Z^T Z and their eigenvalues, largest first, each with its largest entry positive."""
    values, vectors = torch.linalg.eigh(second_moments(rows))
    directions = vectors.T.flip(0)[:count]
    # An eigenvector has no sign; this one does not depend on the machine.
    largest = directions.abs().argmax(dim=1, keepdim=True)
    signs = directions.gather(1, largest).sign()
    return (directions * signs).float().contiguous(), values.flip(0)[:count].clamp_min(0)


class PCA(Decomposition):
    """Principal component analysis.

    Args:
        n_components: Number of concepts k, at most d.
        center: Subtract the mean first.

    Attributes (after `fit`), besides those of `Decomposition`:
        explained_variance_ratio_: (k,), each concept's share of the rows' squared size.
    """

    SIGNED = True

    def __init__(self, n_components: int = 20, *, center: bool = True) -> None:
        self.n_components = n_components
        self.center = center

    def begin(self, rows: Rows) -> None:
        """Take the rows."""
        self._rows = self._centred(rows)
        if self.n_components > rows.width:
            raise BadInputError(f"n_components={self.n_components}; rows of width {rows.width} have no more directions")

    def step(self) -> bool:
        """All there is to do."""
        self.components_, values = principal_directions(self._rows, self.n_components)
        self.explained_variance_ratio_ = (values / max(self._rows.size, 1e-300)).float()
        self.n_iter_ = 1
        return True

    def _end(self) -> Float[Tensor, "n k"]:
        """Measure the error."""
        return self._measure(self._rows)

    def activations(self, chunk: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """Coordinates along the concepts."""
        return chunk @ self.components_.T
