"""k-means by Lloyd's algorithm with greedy k-means++ starts (Arthur & Vassilvitskii 2007, section 7).

Minimises sum_i min_k ||z_i - m_k||^2. As a dictionary: concept k is the direction of centre m_k.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from concept_dict.decomposition import Decomposition, as_rows, generator
from hooked_mm.errors import BadInputError

Activation = Literal["one_hot", "inverse_distance", "cosine"]


def squared_distances(rows: Float[Tensor, "n d"], centres: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
    """||z_i - m_k||^2, never below zero."""
    return ((rows**2).sum(1, keepdim=True) - 2 * rows @ centres.T + (centres**2).sum(1)).clamp_min_(0)


class KMeans(Decomposition):
    """k-means as a concept dictionary.

    Args:
        n_components: Number of clusters k.
        activation: What `transform` returns: `"one_hot"` (the norm of the row's own centre, elsewhere 0, so that
            `inverse_transform` gives the centre), `"inverse_distance"` (1 / (1 + distance), as XL-VLMs), or
            `"cosine"` of the centred row with the concept.
        center: Subtract the mean first. Clusters are the same; concepts become directions from the mean.
        n_init: Starts; the best is kept.
        max_iter: Lloyd iterations per start.
        tol: Stop when the objective falls by less than this share.
        random_state: Seed.

    Attributes (after `fit`), besides those of `Decomposition`:
        cluster_centers_: (k, d), in the space of the rows.
        labels_: (n,), each row's cluster.
        inertia_: The objective.
        n_empty_: How often an empty cluster had to be moved, in the start that was kept.
    """

    def __init__(
        self,
        n_components: int = 20,
        *,
        activation: Activation = "one_hot",
        center: bool = True,
        n_init: int = 4,
        max_iter: int = 100,
        tol: float = 1e-6,
        random_state: int | None = 0,
    ) -> None:
        self.n_components = n_components
        self.activation = activation
        self.center = center
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Tensor | np.ndarray, y: None = None) -> Self:
        """Find the centres of rows X (n, d)."""
        rows = as_rows(X)
        self._check_k(self.n_components, rows)
        if self.activation not in ("one_hot", "inverse_distance", "cosine"):
            raise BadInputError(f"activation={self.activation!r}; it must be 'one_hot', 'inverse_distance' or 'cosine'")
        self._check_at_least_one("n_init", "max_iter")
        self._set_mean(rows)
        random = generator(self.random_state, rows.device)
        best = float("inf")
        for _ in range(self.n_init):
            centres, labels, inertia, steps, empty = self._lloyd(rows, self._start(rows, random))
            if inertia < best:
                best, self.labels_, self.n_iter_, self.n_empty_ = inertia, labels, steps, empty
                kept = centres
        self.inertia_, self.reconstruction_err_ = best, best**0.5
        self.cluster_centers_ = kept + self.mean_
        self.components_ = kept / kept.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return self

    def _start(self, rows: Tensor, random: torch.Generator) -> Float[Tensor, "k d"]:
        """Greedy k-means++: of a few rows drawn in proportion to their squared distance, the one that helps most."""
        trials = 2 + int(np.log(self.n_components))
        first = int(torch.randint(len(rows), (1,), generator=random, device=rows.device))
        centres = rows[first][None].float() - self.mean_
        nearest = self._distances(rows, centres)[:, 0]
        for _ in range(1, self.n_components):
            # Cumulative sums instead of multinomial, which takes at most 2^24 rows.
            total = nearest.double().cumsum(0)
            drawn = torch.rand(trials, generator=random, device=rows.device, dtype=torch.float64) * total[-1]
            tried = rows[torch.searchsorted(total, drawn).clamp_max(len(rows) - 1)].float() - self.mean_
            left = torch.minimum(nearest[:, None], self._distances(rows, tried))
            best = int(left.double().sum(dim=0).argmin())
            nearest, centres = left[:, best], torch.cat([centres, tried[best][None]])
        return centres

    def _distances(self, rows: Tensor, centres: Tensor) -> Float[Tensor, "n m"]:
        return torch.cat([squared_distances(chunk, centres) for _, chunk in self._chunks(rows)])

    def _assign(self, rows: Tensor, centres: Tensor) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        labels = torch.empty(len(rows), dtype=torch.long, device=rows.device)
        distances = torch.empty(len(rows), device=rows.device)
        for part, chunk in self._chunks(rows):
            labels[part] = squared_distances(chunk, centres).argmin(dim=1)
            # By subtraction: as the difference of large numbers little would be left of a small distance.
            distances[part] = (chunk - centres[labels[part]]).square().sum(dim=1)
        return labels, distances

    def _lloyd(self, rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, float, int, int]:
        previous, empty = float("inf"), 0
        labels, distances = self._assign(rows, centres)
        steps = 0
        for _ in tqdm(range(self.max_iter), desc="k-means", delay=2, leave=False):
            steps += 1
            sums = torch.zeros(centres.shape, dtype=torch.float64, device=rows.device)
            for part, chunk in self._chunks(rows):
                sums.index_add_(0, labels[part], chunk.double())
            counts = torch.bincount(labels, minlength=len(centres))
            centres = (sums / counts.clamp_min(1)[:, None]).float()
            for cluster in (counts == 0).nonzero()[:, 0].tolist():
                # An empty cluster takes the row that is worst represented.
                worst = int(distances.argmax())
                centres[cluster], distances[worst] = rows[worst].float() - self.mean_, 0
                empty += 1
            labels, distances = self._assign(rows, centres)
            inertia = float(distances.double().sum())
            if inertia == 0 or (previous - inertia <= self.tol * inertia and bool((counts > 0).all())):
                break
            previous = inertia
        return centres, labels, inertia, steps, empty

    def transform(self, X: Tensor | np.ndarray) -> Float[Tensor, "n k"]:
        """Activations of rows X (n, d), as `activation` says."""
        rows = self._rows_to_transform(X)
        centred = self.cluster_centers_ - self.mean_
        out = torch.zeros(len(rows), len(self.components_), device=rows.device)
        for part, chunk in self._chunks(rows):
            if self.activation == "cosine":
                out[part] = torch.nn.functional.normalize(chunk, dim=1) @ self.components_.T
                continue
            distances = squared_distances(chunk.double(), centred.double()).float()
            if self.activation == "inverse_distance":
                out[part] = 1 / (1 + distances.sqrt())
            else:
                label = distances.argmin(dim=1, keepdim=True)
                out[part] = out[part].scatter(1, label, centred.norm(dim=1)[label])
        return out
