"""Semi-nonnegative matrix factorisation: min ||Z - A C||_F^2 over A >= 0 and any C.

Ding, Li, Jordan, "Convex and Semi-Nonnegative Matrix Factorizations" (2010), eq. 9; their X ~ F G^T has samples in
columns, so their F is our C transposed and their G our A. Alternates between

- C: the least-squares optimum, C = (A^T A)^+ A^T Z;
- A: hierarchical alternating least squares (HALS): column by column, with all else fixed, the non-negative optimum
  a_k = max(0, a_k + (Z c_k - A C c_k) / ||c_k||^2).

Both steps are exact minimisers of their block, so the objective never rises. One alternation needs of the rows only the
sums A^T Z (k, d) and A^T A (k, k). Ding's multiplicative updates need not even reach a stationary point once an entry is
zero, which HALS does.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from concept_dict.decomposition import Decomposition, as_rows
from concept_dict.kmeans import KMeans
from concept_dict.nnls import nonnegative_least_squares
from hooked_mm.errors import BadInputError

Init = Literal["auto", "kmeans", "svd"]


def hals_activations(
    cross: Float[Tensor, "n k"], gram: Float[Tensor, "k k"], start: Float[Tensor, "n k"], sweeps: int
) -> Float[Tensor, "n k"]:
    """Improve A by coordinate descent.

    Args:
        cross: Z C^T.
        gram: C C^T.
        start: A to start from, non-negative.
        sweeps: Passes over the columns.

    Returns:
        A (n, k), non-negative; ||Z - A C||^2 is no higher than at `start`.
    """
    # Columns of A are updated one after the other; as rows of a transposed copy they are contiguous.
    active, wanted = start.T.contiguous(), cross.T.contiguous()
    for _ in range(sweeps):
        for k in range(len(active)):
            if float(gram[k, k]) > 0:
                active[k] = (active[k] + (wanted[k] - gram[k] @ active) / gram[k, k]).clamp_min_(0)
    return active.T.contiguous()


class SemiNMF(Decomposition):
    """Semi-NMF by HALS.

    Args:
        n_components: Number of concepts k.
        init: `"kmeans"` (Ding's: cluster indicators plus 0.2), `"svd"` (both signs of the leading singular vectors), or
            `"auto"`: a few alternations from each, then on from the better.
        center: Subtract the mean first. Without it all concepts share the mean and decode to the same words.
        max_iter: Alternations at most.
        tol: Stop when the objective falls by less than this share of itself over one alternation. Far below the
            default, concepts begin to cancel each other for ever smaller gains.
        random_state: Seed of the k-means start.

    Attributes (after `fit`), besides those of `Decomposition`:
        objective_history_: ||Z - mean - A C||_F^2 at the start, after each alternation, and with the final activations.
        converged_: Whether `tol` was reached.
        n_dead_: Concepts that no row of X activates.
    """

    def __init__(
        self,
        n_components: int = 20,
        *,
        init: Init = "auto",
        center: bool = True,
        max_iter: int = 300,
        tol: float = 1e-5,
        random_state: int | None = 0,
    ) -> None:
        self.n_components = n_components
        self.init = init
        self.center = center
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Tensor | np.ndarray, y: None = None) -> Self:
        """Find C for rows X (n, d)."""
        self.fit_transform(X)
        return self

    def fit_transform(self, X: Tensor | np.ndarray, y: None = None) -> Float[Tensor, "n k"]:
        """Find C for rows X (n, d), and return their activations A (n, k)."""
        rows = as_rows(X)
        self._check_k(self.n_components, rows)
        if self.init not in ("auto", "kmeans", "svd"):
            raise BadInputError(f"init={self.init!r}; it must be 'auto', 'kmeans' or 'svd'")
        self._set_mean(rows)
        size = sum(float(chunk.double().square().sum()) for _, chunk in self._chunks(rows))
        names = ("kmeans", "svd") if self.init == "auto" else (self.init,)
        runs = [self._alternate(rows, self._start(rows, name), size, 10 if len(names) > 1 else 0) for name in names]
        start, history = min(runs, key=lambda run: run[1][-1])
        activations, history = self._alternate(rows, start, size, self.max_iter, history)
        # The last activations are those of `transform`: the exact optimum for the final concepts.
        activations = self.transform(rows)
        cross = sum(activations[part].double().T @ chunk.double() for part, chunk in self._chunks(rows))
        history.append(self._objective(size, activations, self.components_, cross))
        self.objective_history_ = history
        self.n_iter_ = len(history) - 2
        self.converged_ = history[-3] - history[-2] <= self.tol * history[-2]
        self.reconstruction_err_ = history[-1] ** 0.5
        self.n_dead_ = int((activations.amax(dim=0) == 0).sum())
        return activations

    def _start(self, rows: Tensor, name: str) -> Float[Tensor, "n k"]:
        k = self.n_components
        if name == "kmeans":
            labels = KMeans(k, center=self.center, n_init=1, max_iter=30, random_state=self.random_state).fit(rows).labels_
            return torch.nn.functional.one_hot(labels, k).float() + 0.2
        # The right singular vectors from the (d, d) sums; each gives a concept for either sign.
        gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for _, chunk in self._chunks(rows):
            gram += chunk.double().T @ chunk.double()
        directions = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, : (k + 1) // 2].float()
        parts = []
        for _, chunk in self._chunks(rows):
            scores = chunk @ directions
            parts.append(torch.stack([scores.clamp_min(0), (-scores).clamp_min(0)], dim=2).flatten(1)[:, :k])
        start = torch.cat(parts)
        # With more concepts than 2 d singular directions the rest starts constant, to be told apart by the updates.
        missing = k - start.shape[1]
        return torch.cat([start, start.mean() * torch.rand(len(start), missing, device=start.device)], 1) if missing else start

    def _concepts(self, rows: Tensor, activations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The optimal C of unit rows, A rescaled to match, and A^T Z of the rescaled A (float64)."""
        k = activations.shape[1]
        gram = (activations.double().T @ activations.double()) if len(activations) else torch.zeros(k, k)
        cross = torch.zeros(k, rows.shape[1], dtype=torch.float64, device=rows.device)
        for part, chunk in self._chunks(rows):
            cross += activations[part].double().T @ chunk.double()
        concepts = torch.linalg.pinv(gram, hermitian=True) @ cross
        norms = concepts.norm(dim=1)
        alive = norms > 0
        scale = torch.where(alive, norms, torch.ones_like(norms))
        return (concepts / scale[:, None]).float(), (activations * scale).float(), cross * scale[:, None]

    def _alternate(
        self, rows: Tensor, activations: Tensor, size: float, iterations: int, history: list[float] | None = None
    ) -> tuple[Tensor, list[float]]:
        """Alternate from A; the new A and the objective after each step."""
        concepts, activations, cross = self._concepts(rows, activations)
        history = list(history) if history else [self._objective(size, activations, concepts, cross)]
        self.components_ = concepts
        for _ in tqdm(range(iterations), desc="semi-NMF", delay=2, leave=False):
            gram = concepts @ concepts.T
            for part, chunk in self._chunks(rows):
                activations[part] = hals_activations(chunk @ concepts.T, gram, activations[part], sweeps=3)
            activations = self._revive(rows, activations, concepts)
            concepts, activations, cross = self._concepts(rows, activations)
            history.append(self._objective(size, activations, concepts, cross))
            self.components_ = concepts
            if history[-2] - history[-1] <= self.tol * history[-1]:
                break
        return activations, history

    def _revive(self, rows: Tensor, activations: Tensor, concepts: Tensor) -> Tensor:
        """Give a concept that no row uses to the row that is worst represented, which lowers the objective."""
        dead = (activations.amax(dim=0) <= 0).nonzero()[:, 0].tolist()
        if not dead:
            return activations
        errors = torch.empty(len(rows), device=rows.device)
        for part, chunk in self._chunks(rows):
            errors[part] = (chunk - activations[part] @ concepts).square().sum(1)
        for concept, row in zip(dead, errors.topk(len(dead)).indices.tolist(), strict=True):
            # The row keeps no other concept, so its own one, solved next, represents it without error.
            activations[row] = 0
            activations[row, concept] = 1
        return activations

    @staticmethod
    def _objective(size: float, activations: Tensor, concepts: Tensor, cross: Tensor) -> float:
        """||Z - A C||^2 = ||Z||^2 - 2 <A^T Z, C> + <A^T A, C C^T>, in float64."""
        gram = activations.double().T @ activations.double()
        wide = concepts.double()
        return max(0.0, size - 2 * float((cross * wide).sum()) + float((gram * (wide @ wide.T)).sum()))

    def transform(self, X: Tensor | np.ndarray) -> Float[Tensor, "n k"]:
        """Activations of rows X (n, d): non-negative least squares on the fitted concepts."""
        rows = self._rows_to_transform(X)
        gram = self.components_ @ self.components_.T
        return torch.cat([nonnegative_least_squares(chunk @ self.components_.T, gram) for _, chunk in self._chunks(rows)])
