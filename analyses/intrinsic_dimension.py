"""How many dimensions representations locally have, from the distances r_1 <= r_2 <= ... to nearest neighbours.

TwoNN (Facco et al. 2017): on a d-dimensional manifold mu = r_2 / r_1 has the distribution F(mu) = 1 - mu^-d, so d is
the slope through the origin of -log(1 - F) on log mu, with F_j the empirical distribution of the sorted mu_j:

    scikit-dimension (>= 0.5)    F_j = j / N, the smallest 90 % kept
    LLM-Microscope               the u with mu <= 1 + 1e-8 dropped, F_j = (j + u) / (m + u) of the m left, their
                                 smallest fifth kept
    maximum likelihood           (N - 1) / sum log mu  (Denti et al. 2022)

Levina and Bickel (2004), k neighbours:  m_i = (k - 1) / sum_{j<k} log(r_k / r_j)  at row i; over rows the harmonic mean
(MacKay and Ghahramani 2005; scikit-dimension's default) or the mean.

Rows that are there twice (padding, a first token that never differs) have r_1 = 0: 300 of them in 1,000 move
LLM-Microscope's 2.99 to 27.5. So duplicates are left out first, and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from analyses.neighbours import Neighbours, Rows, distinct, nearest
from hooked_mm.errors import BadInputError

TIED = 1e-8
"""LLM-Microscope drops ratios up to 1 + this."""


def _sorted(mu: Float[Tensor, " n"], least: int) -> Float64[Tensor, " n"]:
    wide = mu.double()
    if len(wide) < least or not bool(((wide >= 1) & wide.isfinite()).all()):
        raise BadInputError(
            f"{len(wide)} ratios r_2 / r_1, but at least {least} are needed, finite, none below 1; leave out duplicates"
        )
    return wide.sort().values


def _slope(x: Tensor, y: Tensor) -> float:
    return float((x @ y) / (x @ x))


def two_nn(mu: Float[Tensor, " n"], discard: float = 0.1) -> float:
    """TwoNN as in scikit-dimension from 0.5 on (older ones count j from 0).

    Args:
        mu: r_2 / r_1 of each row, in any order.
        discard: Share of the largest ratios to leave out, where the manifold's borders and curvature show.

    Raises:
        BadInputError: If a ratio is below 1 or not finite, or fewer than two are kept.
    """
    ordered = _sorted(mu, 2)
    kept = int(len(ordered) * (1 - discard))
    if kept < 2 or not 0 < discard < 1:
        raise BadInputError(
            f"discard={discard} keeps {kept} of {len(ordered)} ratios; two are needed, and 0 < discard < 1"
        )
    shares = torch.arange(1, kept + 1, dtype=torch.float64, device=mu.device) / len(ordered)
    return _slope(ordered[:kept].log(), -torch.log1p(-shares))


def two_nn_microscope(mu: Float[Tensor, " n"], keep: float = 0.2, dropped: int = 0) -> float:
    """TwoNN as in LLM-Microscope.

    Args:
        mu: r_2 / r_1 of each row, in any order.
        keep: Share of the smallest ratios that the line is put through.
        dropped: Rows left out already that count into u: duplicates, if the source's result on them is wanted.

    Raises:
        BadInputError: If a ratio is below 1 or not finite, or none is kept.
    """
    ordered = _sorted(mu, 2)
    useful = ordered[ordered > 1 + TIED]
    useless = len(ordered) - len(useful) + dropped
    kept = min(int(len(useful) * keep + 1e-9), len(useful) - 1)
    if kept < 1:
        raise BadInputError(f"keep={keep} of {len(useful)} ratios above 1 is less than one; give more rows")
    places = torch.arange(1 + useless, 1 + useless + kept, dtype=torch.float64, device=mu.device)
    return _slope(useful[:kept].log(), -torch.log1p(-places / (len(useful) + useless)))


def maximum_likelihood(mu: Float[Tensor, " n"]) -> float:
    """(N - 1) / sum log mu, unbiased on a manifold of even density.

    Raises:
        BadInputError: If a ratio is below 1 or not finite, or all are 1.
    """
    total = float(_sorted(mu, 2).log().sum())
    if not total > 0:
        raise BadInputError(
            f"all {len(mu)} ratios r_2 / r_1 are 1, so no dimension fits them; these rows form a lattice"
        )
    return (len(mu) - 1) / total


def levina_bickel(distances: Float[Tensor, "n k"], combine: Literal["harmonic", "mean"] = "harmonic") -> float:
    """Maximum likelihood from k nearest neighbours each, over rows.

    Args:
        distances: Ascending, all above 0, k >= 2; k = 2 gives N / sum log mu.
        combine: `"harmonic"`: 1 / mean(1 / m_i), which is the likelihood of all rows together; `"mean"`, the source's.

    Raises:
        BadInputError: If there are no rows, k < 2, a distance is 0, or all distances of a row are the same.
    """
    if distances.ndim != 2 or not len(distances) or distances.shape[1] < 2 or not bool((distances > 0).all()):
        raise BadInputError(
            f"distances of shape {tuple(distances.shape)}; give (n, k) with k >= 2, all above 0 (leave duplicates out)"
        )
    inverse = inverse_dimensions(distances)
    if combine == "mean" and not bool((inverse > 0).all()):
        raise BadInputError(
            "a row's neighbours are all equally far, so its own estimate is infinite; combine='harmonic'"
        )
    whole = float(inverse.mean())
    if not whole > 0:
        raise BadInputError(
            "every row's neighbours are equally far, so no dimension fits them; these rows form a lattice"
        )
    return 1 / whole if combine == "harmonic" else float((1 / inverse).mean())


def inverse_dimensions(distances: Float[Tensor, "n k"]) -> Float64[Tensor, " n"]:
    """1 / m_i of Levina and Bickel at each row."""
    logs = distances.double().log()
    return (logs[:, -1:] - logs[:, :-1]).mean(1)


@dataclass(frozen=True)
class Dimensions:
    """Of one set of rows.

    Attributes:
        two_nn: scikit-dimension's variant.
        two_nn_microscope: LLM-Microscope's, without duplicates.
        maximum_likelihood: Of mu.
        levina_bickel: Harmonic mean.
        n: Distinct rows.
        duplicates: Rows left out because an equal one is there.
        k: Neighbours that Levina and Bickel's took.
    """

    two_nn: float
    two_nn_microscope: float
    maximum_likelihood: float
    levina_bickel: float
    n: int
    duplicates: int
    k: int


ESTIMATES: dict[str, Callable[[Float64[Tensor, "n k"]], float]] = {
    "two_nn": lambda near: two_nn(near[:, 1] / near[:, 0]),
    "two_nn_microscope": lambda near: two_nn_microscope(near[:, 1] / near[:, 0]),
    "maximum_likelihood": lambda near: maximum_likelihood(near[:, 1] / near[:, 0]),
    "levina_bickel": levina_bickel,
}
"""Each of distances (n, k) of distinct rows."""


@dataclass(frozen=True)
class DistinctNeighbours:
    """Of distinct rows.

    Attributes:
        near: Neighbours; their indices count the kept rows.
        kept: (m,), which rows were kept.
        duplicates: How many were not.
    """

    near: Neighbours
    kept: Int[Tensor, " m"]
    duplicates: int


class _Chosen:
    """Some of the rows."""

    def __init__(self, rows: Rows, kept: Tensor) -> None:
        self.rows, self.kept = rows, kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self.rows[self.kept[index]]


def distinct_neighbours(rows: Rows, k: int = 20, tolerance: float = 0.0) -> DistinctNeighbours:
    """The k nearest of every distinct row.

    Args:
        rows: (n, d), a tensor or what reads rows piece by piece.
        k: At least 2; fewer where there are not so many distinct rows.
        tolerance: See `neighbours.distinct`.

    Raises:
        BadInputError: If fewer than three rows are distinct, or rows are not finite.
    """
    found = distinct(rows, tolerance)
    if len(found.kept) < 3 or k < 2:
        raise BadInputError(
            f"{len(found.kept)} of {len(rows)} rows are distinct, k={k}; a dimension needs three rows and k >= 2"
        )
    chosen = _Chosen(rows, found.kept) if found.duplicates else rows
    return DistinctNeighbours(nearest(chosen, min(k, len(chosen) - 1)), found.kept, found.duplicates)


def intrinsic_dimension(rows: Rows, k: int = 20, tolerance: float = 0.0) -> Dimensions:
    """All four estimates.

    Args:
        rows: (n, d), of any floating dtype.
        k: Neighbours for Levina and Bickel's.
        tolerance: See `neighbours.distinct`.

    Raises:
        BadInputError: If fewer than ten rows are distinct, or rows are not finite.
    """
    found = distinct_neighbours(rows, k, tolerance)
    near = found.near.distances
    estimates = {name: estimate(near) for name, estimate in ESTIMATES.items()}
    return Dimensions(**estimates, n=len(near), duplicates=found.duplicates, k=near.shape[1])
