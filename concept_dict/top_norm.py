"""The rows of largest norm as concepts (XL-VLMs's "simple"): what any method that learns has to beat.

C holds the directions of the k rows of largest norm; A is the non-negative least-squares optimum for them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from concept_dict.decomposition import Decomposition, unit
from concept_dict.nnls import nonnegative_least_squares
from concept_dict.rows import Rows


class TopNorm(Decomposition):
    """The k rows of largest norm.

    Args:
        n_components: Number of concepts k.
        center: Subtract the mean first.
        whiten: Multiply rows by S^(-whiten / 2), S their second moments, first: from 0, as they are, to 1, where all
            directions have the same size. With 1/2 a few large ones no longer decide alone (see `whitening`).
    """

    def __init__(self, n_components: int = 20, *, center: bool = True, whiten: float = 0.0) -> None:
        self.n_components = n_components
        self.center = center
        self.whiten = whiten

    def begin(self, rows: Rows) -> None:
        """Take the rows."""
        self._rows = self._centred(rows)

    def step(self) -> bool:
        """All there is to do."""
        rows = self._rows
        parts = [chunk.norm(dim=1) for _, chunk in rows.chunks()]
        norms = torch.cat(parts) if parts else torch.zeros(0, device=rows.device)
        found = rows.largest(norms, self.n_components)
        self.components_ = unit(torch.stack([rows.row(one) for one in found]))
        self.n_iter_ = 1
        return True

    def _end(self) -> Float[Tensor, "n k"]:
        """Measure the error."""
        return self._measure(self._rows)

    def activations(self, chunk: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """The non-negative least-squares optimum."""
        wide = self._axes.double()
        return nonnegative_least_squares(chunk.double() @ wide.T, wide @ wide.T)
