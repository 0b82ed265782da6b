"""Z ~ A C with A >= 0 and concepts of any sign, by alternation: what semi-NMF and the non-negative dictionary share.

Minimises

    ||Z - A C||_F^2 + 2 lambda sum(A)      over A >= 0, ||c_k|| = 1,      lambda = alpha * rms row norm of Z

by turns in

- A: hierarchical alternating least squares (HALS), a_k <- max(0, a_k + w (Z c_k - A C c_k - lambda) / ||c_k||^2) for
  one k after the other, over-relaxed by w between 1 and 2: concepts that are used together need many sweeps without;
- C: for alpha = 0 the least-squares optimum (A^T A)^+ A^T Z; else concept by concept the optimum within the unit ball
  (Mairal et al., "Online learning for matrix factorization and sparse coding", 2010, algorithm 2);
- concepts scaled to norm 1, activations in return.

No turn can raise the objective. One alternation goes through the rows once and needs of them only the sums A^T Z (k, d)
and A^T A (k, k), so it is exact on any number of processes.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from concept_dict.decomposition import Decomposition, unit
from concept_dict.kmeans import KMeans
from concept_dict.nnls import hals_activations, nonnegative_least_squares
from concept_dict.pca import principal_directions
from concept_dict.rows import WIDENED, Rows
from hooked_mm.errors import BadInputError

Init = Literal["kmeans", "svd"]

SWEEPS = 8
"""Passes over the activations in an alternation: cheap beside the products with the rows."""

BALL_SWEEPS = 3
"""Passes over the concepts in an alternation with a price."""

COARSE = 1e-3
"""While an alternation explains more by a larger share, the rounding of float32 in A^T Z is nothing beside that."""

NEGLIGIBLE = 1e-10
"""A concept whose activations' sum of squares is a smaller share of the largest lives by rounding alone: it is dead."""


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


class Factorisation(Decomposition):
    """Base of `SemiNMF` and `NonNegativeDictionary`, which say what `alpha` and `init` are.

    Attributes (after `fit`), besides those of `Decomposition`:
        objective_history_: The objective (of whitened rows, if they are) at the start, after each alternation, and with
            the final activations.
        penalty_: lambda.
        converged_: Whether `tol` was reached.
        n_dead_: Concepts that no row of any process activates.
    """

    alpha: float
    init: Init | Tensor
    max_iter: int
    tol: float
    random_state: int | None

    def start_from(self, fitted: Decomposition) -> Self:
        """Make the next fit begin with the concepts of another."""
        return self.set_params(init=fitted.components_)

    def begin(self, rows: Rows) -> None:
        """Start from concepts, and good activations for them."""
        if isinstance(self.init, str):
            self._check_options(init=("kmeans", "svd"))
        self._check_at_least_one("max_iter")
        if self.alpha < 0:
            raise BadInputError(f"alpha={self.alpha}; it must not be negative")
        self._rows = self._centred(rows)
        self.penalty_ = self.alpha * (self._rows.size / self._rows.total) ** 0.5
        self.components_ = self._start(rows)
        self._active, self._coarse = self._first_activations(), False
        self.objective_history_ = [self._objective(*self._sums())]
        self.converged_, self.n_iter_ = False, 0

    def _first_activations(self) -> Float[Tensor, "n k"]:
        active = torch.zeros(self._rows.count, self.n_components, device=self._rows.device)
        gram = self.components_ @ self.components_.T
        for part, chunk in self._rows.chunks():
            if isinstance(self.init, Tensor):
                # Concepts at hand may be those of an earlier fit, whose end is not to be left again.
                active[part] = self._optimum(chunk)
                continue
            wanted = chunk @ self.components_.T - self.penalty_
            # From nothing over-relaxation would overshoot, and wake concepts that no row needs.
            active[part] = hals_activations(wanted, gram, active[part], SWEEPS, relaxation=1.0)
        return active

    def _start(self, rows: Rows) -> Float[Tensor, "k d"]:
        k, width = self.n_components, rows.width
        if isinstance(self.init, Tensor):
            self._check_start(self.init, width)
            start = self.init.to(rows.device, torch.float32)
            return unit(start if self._rows.whitening is None else start @ self._rows.whitening)
        if self.init == "kmeans":
            start = KMeans(
                k, center=self.center, whiten=self.whiten, n_init=1, max_iter=10, random_state=self.random_state
            )
            return start.fit(rows)._axes
        # Each direction with either sign: no more than 2 d concepts can be had.
        if k > 2 * width:
            raise BadInputError(f"init='svd' gives at most {2 * width} concepts for rows of this width; use 'kmeans'")
        directions, _ = principal_directions(self._rows, -(-k // 2))
        return torch.stack([directions, -directions], dim=1).flatten(0, 1)[:k].clone()

    def step(self) -> bool:
        """One alternation: new activations with their sums and, in `components_`, new concepts of norm 1."""
        concepts = self.components_
        gram = concepts @ concepts.T
        inner, cross = self._no_sums()
        for part, chunk in self._rows.chunks():
            wanted = chunk @ concepts.T - self.penalty_
            found = self._active[part] = hals_activations(wanted, gram, self._active[part], SWEEPS)
            self._add(inner, cross, found, chunk)
        inner, cross = self._over_processes(inner, cross)
        if self._revive(inner):
            inner, cross = self._sums()
        if self.alpha:
            wide = ball_concepts(inner, cross, self.components_.double(), BALL_SWEEPS)
        else:
            wide = torch.linalg.pinv(inner, rtol=1e-12, hermitian=True) @ cross
        norms = wide.norm(dim=1)
        scale = torch.where(norms > 0, norms, torch.ones_like(norms))
        self.components_ = (wide / scale[:, None]).float()
        self._active *= scale.float()
        history = self.objective_history_
        history.append(self._objective(inner * scale[:, None] * scale, cross * scale[:, None]))
        self.n_iter_ += 1
        # A share of what is left would never be reached where nothing is left, and at once where all but noise is.
        fall, explained = history[-2] - history[-1], self._rows.size - history[-1]
        self.converged_, self._coarse = fall <= self.tol * explained, fall > COARSE * explained
        return self.converged_ or self.n_iter_ == self.max_iter

    def progress(self) -> dict[str, float]:
        """The objective."""
        return {"objective": self.objective_history_[-1]}

    def _end(self) -> Float[Tensor, "n k"]:
        """The last activations are those of `transform`: the exact optimum for the final concepts."""
        rows = self._rows
        active = self._measure(rows, lambda part, chunk: self._optimum(chunk, self._active[part]))
        total = float(rows.processes.sum(active.double().sum()))
        self.objective_history_.append(self.reconstruction_err_**2 + 2 * self.penalty_ * total)
        used = rows.processes.sum((active > 0).sum(dim=0))
        self.n_dead_ = int((used == 0).sum())
        del self._active, self._coarse
        return active

    def activations(self, chunk: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """The exact optimum of the objective for these concepts."""
        return self._optimum(chunk)

    def _optimum(self, chunk: Float[Tensor, "m d"], start: Float[Tensor, "m k"] | None = None) -> Float[Tensor, "m k"]:
        """The same from any start, and sooner from a good one."""
        # In float64: where concepts nearly cancel, rounding of the products would be magnified in the activations.
        wide = self._axes.double()
        gram, cross = wide @ wide.T, torch.cat([part.double() @ wide.T for part in chunk.split(WIDENED)])
        cross -= self.penalty_
        return nonnegative_least_squares(cross, gram, start)

    def _no_sums(self) -> tuple[Float[Tensor, "k k"], Float[Tensor, "k d"]]:
        k, width = self.components_.shape
        zeros = torch.zeros(k, k + width, dtype=torch.float64, device=self._rows.device)
        return zeros[:, :k], zeros[:, k:]

    def _add(self, inner: Tensor, cross: Tensor, active: Tensor, chunk: Tensor) -> None:
        """A^T A and A^T Z, added up in float64: all that the concepts need to know of the rows."""
        wide = active.double()
        inner += wide.T @ wide
        for some, rows in zip(wide.split(WIDENED), chunk.split(WIDENED), strict=True):
            cross += some.float().T @ rows if self._coarse else some.T @ rows.double()

    def _over_processes(self, inner: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        processes = self._rows.processes
        return processes.sum(inner.contiguous()), processes.sum(cross.contiguous())

    def _sums(self) -> tuple[Float[Tensor, "k k"], Float[Tensor, "k d"]]:
        inner, cross = self._no_sums()
        for part, chunk in self._rows.chunks():
            self._add(inner, cross, self._active[part], chunk)
        return self._over_processes(inner, cross)

    def _revive(self, inner: Tensor) -> bool:
        """Give a concept that no row uses to a row that is badly represented, and no other one to that row."""
        used = inner.diagonal()
        dead = (used <= NEGLIGIBLE * used.max()).nonzero()[:, 0].tolist()
        if not dead:
            return False
        rows, active = self._rows, self._active
        gain = torch.empty(rows.count, device=rows.device)
        for part, chunk in rows.chunks():
            error = (chunk - active[part] @ self.components_).square().sum(1)
            # The row's own concept represents it without error, at the price of its size instead of its activations'.
            gain[part] = error - 2 * self.penalty_ * (chunk.norm(dim=1) - active[part].sum(1))
        revived = False
        # Concepts are shared with whoever took them before.
        self.components_ = self.components_.clone()
        for concept, found in zip(dead, rows.largest(gain, len(dead)), strict=False):
            if found.value <= 0:
                continue
            row = rows.row(found)
            if found.rank == rows.processes.rank:
                active[found.index] = 0
                active[found.index, concept] = row.norm()
            self.components_[concept] = row / row.norm()
            revived = True
        return revived

    def _objective(self, inner: Tensor, cross: Tensor) -> float:
        """||Z||^2 - 2 <A^T Z, C> + <A^T A, C C^T> + 2 lambda sum(A), in float64, from the sums over rows."""
        wide = self.components_.double()
        fit = self._rows.size - 2 * float((cross * wide).sum()) + float((inner * (wide @ wide.T)).sum())
        total = float(self._rows.processes.sum(self._active.double().sum())) if self.penalty_ else 0.0
        return max(0.0, fit) + 2 * self.penalty_ * total
