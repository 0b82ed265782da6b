"""Semi-nonnegative matrix factorisation: Z ~ A C with A >= 0 and concepts of any sign.

Minimises

    ||Z - A C||_F^2 + 2 lambda sum(A)      over A >= 0, ||c_k|| = 1,      lambda = alpha * rms row norm of Z.

`alpha=0` is the objective of Ding, Li, Jordan, "Convex and Semi-Nonnegative Matrix Factorizations" (2010), eq. 9 (their
X ~ F G^T has samples in columns: F is our C transposed, G our A), whose scale is free and fixed here by unit concepts.
That objective alone does not say which concepts: on centred rows any concepts with a positive combination near zero
reproduce a whole (k - 1)-dimensional subspace, all activations large and rising together, and a good optimiser ends
there, near PCA in disguise. The small price `alpha` on activations picks, among factorisations that fit about equally
well, the one with few and small activations, whose concepts can be told apart.

Alternates between

- A: hierarchical alternating least squares (HALS), a_k = max(0, a_k + (Z c_k - A C c_k - lambda) / ||c_k||^2);
- C: for alpha = 0 the least-squares optimum (A^T A)^+ A^T Z; else concept by concept the optimum within the unit ball
  (Mairal et al., "Online learning for matrix factorization and sparse coding", 2010, algorithm 2);
- concepts scaled to norm 1, activations in return.

No step can raise the objective. One alternation needs of the rows only the sums A^T Z (k, d) and A^T A (k, k).
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

Init = Literal["kmeans", "svd"]


def hals_activations(
    cross: Float[Tensor, "n k"], gram: Float[Tensor, "k k"], start: Float[Tensor, "n k"], sweeps: int
) -> Float[Tensor, "n k"]:
    """Improve A by coordinate descent.

    Args:
        cross: Z C^T - lambda.
        gram: C C^T.
        start: A to start from, non-negative.
        sweeps: Passes over the columns.

    Returns:
        A (n, k), non-negative; the objective is no higher than at `start`.
    """
    # Columns of A are updated one after the other; as rows of a transposed copy they are contiguous.
    active, wanted = start.T.contiguous(), cross.T.contiguous()
    diagonal = gram.diagonal().tolist()
    for _ in range(sweeps):
        for k, size in enumerate(diagonal):
            if size > 0:
                active[k] = (active[k] + (wanted[k] - gram[k] @ active) / size).clamp_min_(0)
    return active.T.contiguous()


def ball_concepts(
    gram: Float[Tensor, "k k"], cross: Float[Tensor, "k d"], start: Float[Tensor, "k d"], sweeps: int
) -> Float[Tensor, "k d"]:
    """Improve C by block coordinate descent within the unit ball.

    Args:
        gram: A^T A.
        cross: A^T Z.
        start: C to start from.
        sweeps: Passes over the concepts.
    """
    concepts = start.clone()
    for _ in range(sweeps):
        for k, size in enumerate(gram.diagonal().tolist()):
            if size > 0:
                wanted = concepts[k] + (cross[k] - gram[k] @ concepts) / size
                concepts[k] = wanted / wanted.norm().clamp_min(1)
    return concepts


class SemiNMF(Decomposition):
    """Semi-NMF by HALS.

    Args:
        n_components: Number of concepts k.
        alpha: Price of activations, relative to the rows' root mean square norm; 0 is Ding's objective.
        init: Where concepts start: `"kmeans"` centres (as Ding), or `"svd"`, both signs of leading singular vectors.
        center: Subtract the mean first. Without it all concepts share the mean and decode to the same words.
        max_iter: Alternations at most.
        tol: Stop when the objective falls by less than this share of itself over one alternation.
        random_state: Seed of the k-means start.

    Attributes (after `fit`), besides those of `Decomposition`:
        objective_history_: The objective at the start, after each alternation, and with the final activations.
        penalty_: lambda.
        converged_: Whether `tol` was reached.
        n_dead_: Concepts that no row of X activates.
    """

    def __init__(
        self,
        n_components: int = 20,
        *,
        alpha: float = 0.01,
        init: Init = "kmeans",
        center: bool = True,
        max_iter: int = 300,
        tol: float = 1e-5,
        random_state: int | None = 0,
    ) -> None:
        self.n_components = n_components
        self.alpha = alpha
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
        if self.init not in ("kmeans", "svd"):
            raise BadInputError(f"init={self.init!r}; it must be 'kmeans' or 'svd'")
        self._check_at_least_one("max_iter")
        if self.alpha < 0:
            raise BadInputError(f"alpha={self.alpha}; it must not be negative")
        self._set_mean(rows)
        size = sum(float(chunk.double().square().sum()) for _, chunk in self._chunks(rows))
        self.penalty_ = self.alpha * (size / len(rows)) ** 0.5
        self.components_ = self._start(rows)
        activations = self.transform(rows)
        history = [self._objective(activations, *self._sums(rows, activations), size)]
        self.converged_, self.n_iter_ = False, 0
        for _ in tqdm(range(self.max_iter), desc="semi-NMF", delay=2, leave=False):
            activations, inner, cross = self._step(rows, activations)
            history.append(self._objective(activations, inner, cross, size))
            self.n_iter_ += 1
            if history[-2] - history[-1] <= self.tol * history[-1]:
                self.converged_ = True
                break
        # The last activations are those of `transform`: the exact optimum for the final concepts.
        activations = self.transform(rows)
        history.append(self._objective(activations, *self._sums(rows, activations), size))
        self.objective_history_ = history
        self.reconstruction_err_ = max(0.0, history[-1] - 2 * self.penalty_ * float(activations.double().sum())) ** 0.5
        self.n_dead_ = int((activations.amax(dim=0) == 0).sum())
        return activations

    def _start(self, rows: Tensor) -> Float[Tensor, "k d"]:
        k = self.n_components
        if self.init == "kmeans":
            start = KMeans(k, center=self.center, n_init=1, max_iter=30, random_state=self.random_state)
            return start.fit(rows).components_
        # Right singular vectors from the (d, d) sums, each with either sign: no more than 2 d concepts can be had.
        gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for _, chunk in self._chunks(rows):
            gram += chunk.double().T @ chunk.double()
        directions = torch.linalg.eigh(gram).eigenvectors.T.flip(0).float()
        if k > 2 * len(directions):
            raise BadInputError(
                f"init='svd' gives at most {2 * len(directions)} concepts for rows of this width; use 'kmeans'"
            )
        return torch.stack([directions, -directions], dim=1).flatten(0, 1)[:k].clone()

    def _sums(self, rows: Tensor, activations: Tensor) -> tuple[Float[Tensor, "k k"], Float[Tensor, "k d"]]:
        """A^T A and A^T Z in float64: all that the concepts need to know of the rows."""
        wide = activations.double()
        cross = torch.zeros(wide.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for part, chunk in self._chunks(rows):
            cross += wide[part].T @ chunk.double()
        return wide.T @ wide, cross

    def _step(self, rows: Tensor, activations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One alternation: new activations with their sums and, in `components_`, new concepts of norm 1."""
        concepts = self.components_
        gram = concepts @ concepts.T
        for part, chunk in self._chunks(rows):
            cross = chunk @ concepts.T - self.penalty_
            activations[part] = hals_activations(cross, gram, activations[part], sweeps=3)
        activations = self._revive(rows, activations)
        inner, cross = self._sums(rows, activations)
        if self.alpha:
            wide = ball_concepts(inner, cross, concepts.double(), sweeps=3)
        else:
            wide = torch.linalg.pinv(inner, rtol=1e-12, hermitian=True) @ cross
        norms = wide.norm(dim=1)
        scale = torch.where(norms > 0, norms, torch.ones_like(norms))
        self.components_ = (wide / scale[:, None]).float()
        return (activations * scale).float(), inner * scale[:, None] * scale, cross * scale[:, None]

    def _revive(self, rows: Tensor, activations: Tensor) -> Tensor:
        """Give a concept that no row uses to a row that is badly represented, and no other one to that row."""
        dead = (activations.amax(dim=0) <= 0).nonzero()[:, 0].tolist()
        if not dead:
            return activations
        gain, sizes = torch.empty(len(rows), device=rows.device), torch.empty(len(rows), device=rows.device)
        for part, chunk in self._chunks(rows):
            error = (chunk - activations[part] @ self.components_).square().sum(1)
            sizes[part] = chunk.norm(dim=1)
            # The row's own concept represents it without error, at the price of its size instead of its activations'.
            gain[part] = error - 2 * self.penalty_ * (sizes[part] - activations[part].sum(1))
        best = gain.topk(len(dead))
        for concept, row, won in zip(dead, best.indices.tolist(), best.values.tolist(), strict=True):
            if won > 0:
                activations[row] = 0
                activations[row, concept] = sizes[row]
                self.components_[concept] = (rows[row].float() - self.mean_) / sizes[row]
        return activations

    def _objective(self, activations: Tensor, inner: Tensor, cross: Tensor, size: float) -> float:
        """||Z||^2 - 2 <A^T Z, C> + <A^T A, C C^T> + 2 lambda sum(A), in float64, from the sums over rows."""
        wide = self.components_.double()
        fit = size - 2 * float((cross * wide).sum()) + float((inner * (wide @ wide.T)).sum())
        return max(0.0, fit) + 2 * self.penalty_ * float(activations.double().sum())

    def transform(self, X: Tensor | np.ndarray) -> Float[Tensor, "n k"]:
        """Activations of rows X (n, d): the exact optimum of the objective for the fitted concepts, row by row."""
        rows = self._rows_to_transform(X)
        # In float64: where concepts nearly cancel, rounding of the products would be magnified in the activations.
        wide = self.components_.double()
        parts = [chunk.double() @ wide.T - self.penalty_ for _, chunk in self._chunks(rows)]
        return torch.cat([nonnegative_least_squares(part, wide @ wide.T) for part in parts])
