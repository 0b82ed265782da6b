"""k-means by Lloyd's algorithm with greedy k-means++ starts (Arthur & Vassilvitskii 2007, section 7).

Minimises sum_i min_k ||z_i - m_k||^2. As a dictionary: concept k is the direction of centre m_k. An iteration needs of
the rows only each cluster's sum and count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from concept_dict.decomposition import Decomposition, generator, unit
from concept_dict.rows import WIDENED, Centred, Rows
from hooked_mm.errors import BadInputError

Activation = Literal["one_hot", "inverse_distance", "cosine"]
Init = Literal["k-means++"]


def squared_distances(
    rows: Float[Tensor, "n d"], centres: Float[Tensor, "k d"], squares: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "n k"]:
    """||z_i - m_k||^2, never below zero.

    Args:
        rows: z.
        centres: m.
        squares: ||z_i||^2, if they are known.
    """
    own = rows.square().sum(1) if squares is None else squares
    return torch.addmm(own[:, None] + centres.square().sum(1), rows, centres.T, alpha=-2).clamp_min_(0)


@dataclass
class _Start:
    """One start of Lloyd's algorithm: centres, each row's cluster and squared distance to its centre."""

    centres: Tensor
    labels: Tensor
    distances: Tensor
    inertia: float
    steps: int = 0
    empty: int = 0


class KMeans(Decomposition):
    """k-means as a concept dictionary.

    Args:
        n_components: Number of clusters k.
        activation: What `transform` returns: `"one_hot"` (the norm of the row's own centre, elsewhere 0, so that
            `inverse_transform` gives the centre), `"inverse_distance"` (1 / (1 + distance), as XL-VLMs), or
            `"cosine"` of the centred row with the concept.
        center: Subtract the mean first. Clusters are the same; concepts become directions from the mean.
        whiten: Multiply rows by S^(-whiten / 2), S their second moments, first: from 0, as they are, to 1, where all
            directions have the same size. With 1/2 a few large ones no longer decide alone (see `whitening`).
        init: Where centres start: `"k-means++"`, or centres (k, d) in the space of the rows, for a single start.
        n_init: Starts; the best is kept.
        max_iter: Lloyd iterations per start.
        tol: A start ends when centres move by less than this share of the rows' variance (as scikit-learn), or when no
            row changes its cluster.
        random_state: Seed.

    Attributes (after `fit`), besides those of `Decomposition`:
        norms_: (k,), of the centres in the space of the fit.
        labels_: (n,), the cluster of each of this process's rows.
        inertia_: The objective, in the space of the fit.
        n_empty_: How often an empty cluster had to be moved, in the start that was kept.
    """

    def __init__(
        self,
        n_components: int = 20,
        *,
        activation: Activation = "one_hot",
        init: Init | Tensor = "k-means++",
        center: bool = True,
        whiten: float = 0.0,
        n_init: int = 4,
        max_iter: int = 100,
        tol: float = 1e-4,
        random_state: int | None = 0,
    ) -> None:
        self.n_components = n_components
        self.activation = activation
        self.init = init
        self.center = center
        self.whiten = whiten
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def start_from(self, fitted: Decomposition) -> Self:
        """Make the next fit begin with the centres of another.

        Raises:
            BadInputError: If it has none: a direction says not where along it a centre should lie.
        """
        if not isinstance(fitted, KMeans):
            raise BadInputError(f"KMeans starts from centres, and {type(fitted).__name__} has none; give one of KMeans")
        return self.set_params(init=fitted.cluster_centers_)

    def begin(self, rows: Rows) -> None:
        """Draw the first start."""
        self._check_options(activation=("one_hot", "inverse_distance", "cosine"))
        self._check_at_least_one("n_init", "max_iter")
        if isinstance(self.init, Tensor):
            self._check_start(self.init, rows.width)
        else:
            self._check_options(init=("k-means++",))
        self._rows = self._centred(rows)
        self._random = generator(self.random_state, rows.processes.size)
        self._best: _Start | None = None
        self._begun = 0
        self._next_start()

    def _next_start(self) -> None:
        if isinstance(self.init, Tensor):
            centres = self._rows.changed(self.init.to(self._rows.device, torch.float32))
        else:
            centres = self._plus_plus(self._rows, self._random)
        self._begun += 1
        self._now = _Start(centres, *self._assign(self._rows, centres))

    def _plus_plus(self, rows: Centred, random: torch.Generator) -> Float[Tensor, "k d"]:
        """Greedy k-means++: of a few rows drawn in proportion to their squared distance, the one that helps most."""
        trials = 2 + int(np.log(self.n_components))
        equal = torch.ones(rows.count, device=rows.device)
        centres = rows.draw(equal, torch.rand(1, generator=random, dtype=torch.float64))
        nearest = self._distances(rows, centres)[:, 0]
        for _ in range(1, self.n_components):
            tried = rows.draw(nearest, torch.rand(trials, generator=random, dtype=torch.float64))
            left = torch.minimum(nearest[:, None], self._distances(rows, tried))
            best = int(rows.processes.sum(left.double().sum(dim=0)).argmin())
            nearest, centres = left[:, best], torch.cat([centres, tried[best][None]])
        return centres

    def _distances(self, rows: Centred, centres: Tensor) -> Float[Tensor, "n m"]:
        parts = [squared_distances(chunk, centres, rows.squares[part]) for part, chunk in rows.chunks()]
        return torch.cat(parts) if parts else torch.zeros(0, len(centres), device=rows.device)

    def _assign(self, rows: Centred, centres: Tensor) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], float]:
        labels = torch.empty(rows.count, dtype=torch.long, device=rows.device)
        distances = torch.empty(rows.count, device=rows.device)
        for part, chunk in rows.chunks():
            distances[part], labels[part] = squared_distances(chunk, centres, rows.squares[part]).min(dim=1)
        return labels, distances, float(rows.processes.sum(distances.double().sum()))

    def _inertia(self, rows: Centred, start: _Start) -> float:
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        for part, chunk in rows.chunks():
            # By subtraction: as the difference of large numbers little would be left of a small distance.
            rest = chunk - start.centres[start.labels[part]]
            total += torch.linalg.vector_norm(rest, dtype=torch.float64).square()
        return float(rows.processes.sum(total))

    def step(self) -> bool:
        """One iteration of Lloyd's algorithm."""
        rows, now = self._rows, self._now
        sums = torch.zeros(now.centres.shape, dtype=torch.float64, device=rows.device)
        for part, chunk in rows.chunks():
            sums += torch.zeros_like(now.centres).index_add_(0, now.labels[part], chunk)
        counts = torch.bincount(now.labels, minlength=len(now.centres))
        sums, counts = rows.processes.sum(sums), rows.processes.sum(counts)
        centres = (sums / counts.clamp_min(1)[:, None]).float()
        for cluster in (counts == 0).nonzero()[:, 0].tolist():
            # An empty cluster takes the row that is worst represented.
            (worst,) = rows.largest(now.distances, 1)
            centres[cluster] = rows.row(worst)
            if worst.rank == rows.processes.rank:
                now.distances[worst.index] = 0
            now.empty += 1
        moved = float((centres - now.centres).double().square().sum())
        labels, distances, inertia = self._assign(rows, centres)
        same = not bool(rows.processes.sum((labels != now.labels).sum()))
        now.centres, now.labels, now.distances, now.inertia = centres, labels, distances, inertia
        now.steps += 1
        variance = (rows.size - float(sums.sum(0).square().sum()) / rows.total) / (rows.total * rows.width)
        settled = same or moved <= self.tol * variance
        if now.steps < self.max_iter and not (settled and bool((counts > 0).all())) and inertia > 0:
            return False
        now.inertia = self._inertia(rows, now)
        if self._best is None or now.inertia < self._best.inertia:
            self._best = now
        if self._begun == self.n_init or isinstance(self.init, Tensor):
            return True
        self._next_start()
        return False

    def progress(self) -> dict[str, float]:
        """The objective of the start that is being improved."""
        return {"objective": self._now.inertia}

    def _end(self) -> Float[Tensor, "n k"]:
        """Keep the best start."""
        best, rows = self._best, self._rows
        assert best is not None
        self.labels_, self.n_iter_, self.n_empty_ = best.labels, best.steps, best.empty
        self.inertia_, self.reconstruction_err_ = best.inertia, best.inertia**0.5
        self.components_, self.norms_ = unit(best.centres), best.centres.norm(dim=1)
        del self._random, self._best, self._now
        parts = [self.activations(chunk) for _, chunk in rows.chunks()]
        return torch.cat(parts) if parts else torch.zeros(0, self.n_components, device=rows.device)

    @property
    def cluster_centers_(self) -> Float[Tensor, "k d"]:
        """(k, d), in the space of the rows."""
        norms = self.norms_ * getattr(self, "sizes_", 1)
        return self.components_ * norms[:, None] + self.mean_

    def _approximation(self, part: slice, active: Float[Tensor, "n k"]) -> Float[Tensor, "m d"]:
        # Whatever activations are.
        return (self.cluster_centers_ - self.mean_)[self.labels_[part]]

    def _sized(self, active: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
        return super()._sized(active) if self.activation == "one_hot" else active

    def activations(self, chunk: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """As `activation` says."""
        if self.activation == "cosine":
            return torch.nn.functional.normalize(chunk, dim=1) @ self._axes.T
        # In float64: as the difference of large numbers little would be left of a small distance.
        wide = (self._axes * self.norms_[:, None]).double()
        distances = torch.cat([squared_distances(some.double(), wide).float() for some in chunk.split(WIDENED)])
        if self.activation == "inverse_distance":
            return 1 / (1 + distances.sqrt())
        label = distances.argmin(dim=1, keepdim=True)
        return torch.zeros_like(distances).scatter(1, label, self.norms_[label])
