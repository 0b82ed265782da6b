"""How linear the step from one layer to the next is (LLM-Microscope; Razzhigaev et al. 2024, arXiv 2405.12250).

x, y (n, d): the same positions in two consecutive residual streams, both freed from their mean.

    score = 1 - ||X A* - Y||_F^2 / ||Y||_F^2,    A* = argmin_A ||X A - Y||_F

The in-sample R^2 of a multi-output linear regression. (The source calls it Procrustes similarity, but A* is any map,
not a rotation; its division of X and Y by their norms cancels.) *Main contribution*: the same of y - x, what the layer
adds. In sample, d predictors explain (rank) / (n - 1) of pure noise, so two more scores stand beside:

    adjusted = 1 - (1 - score) (n - 1) / (n - 1 - rank)
    held out: A* and both means from some samples, the residual of others over their spread about the first's mean

Needed of the rows are only their moments. A* comes from the eigenvectors of the Gram matrix of X, its columns scaled
to length 1, without those below a relative cut-off: a duplicated or constant column changes nothing. Where eigenvalues
come near the cut-off, and the rows are at hand, the singular vectors of X take over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from analyses.moments import CHUNK_NUMBERS, Moments, PairMoments, combine, pair_moments
from hooked_mm.errors import BadInputError

CUT_OFF = 1e-12
"""Eigenvalues of the scaled Gram matrix below this share of the largest count as zero: singular values below 1e-6."""

DOUBTFUL = 1e-7
"""Eigenvalues below this share are too inexact for nine digits of the score."""


@dataclass(frozen=True)
class Linearity:
    """How linear a step is.

    Attributes:
        score: In sample; 1 for a linear map, at least 0.
        adjusted: For the number of predictors: about 0 for noise; NaN where n - 1 <= rank.
        held_out: On rows that A* was not fitted to, below 0 if worse than their mean; NaN unless asked for.
        n: Rows (or the sum of their weights).
        rank: Of X.
        condition: Of X as far as it was used: largest over smallest singular value, columns scaled to length 1.
    """

    score: float
    adjusted: float
    held_out: float
    n: float
    rank: int
    condition: float


@dataclass(frozen=True)
class LinearMap:
    """x -> mean_y + (x - mean_x) A.

    Attributes:
        weight: A, (d, e).
        mean_x: (d,).
        mean_y: (e,).
    """

    weight: Float64[Tensor, "d e"]
    mean_x: Float64[Tensor, " d"]
    mean_y: Float64[Tensor, " e"]

    def errors(self, x: Float[Tensor, "n d"], y: Float[Tensor, "n e"]) -> Float64[Tensor, " n"]:
        """Per token E_i = ||A* x_i - y_i||_2, both about the means, in the units of y.

        Over the rows that the map was fitted to, sum E_i^2 = (1 - score) sum ||y_i - mean_y||^2.
        """
        step = max(1, CHUNK_NUMBERS // max(x.shape[1], y.shape[1], 1))
        parts = []
        for start in range(0, len(x), step):
            apart = x[start : start + step].double() - self.mean_x
            parts.append((apart @ self.weight - (y[start : start + step].double() - self.mean_y)).norm(dim=1))
        return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of what X reaches, in the coordinates of its columns.

    Attributes:
        whitener: B (d, rank) with B^T X^T X B = I.
        condition: See `Linearity`.
        doubtful: Whether some eigenvalue was kept, or left out, that is too inexact.
    """

    whitener: Float64[Tensor, "d rank"]
    condition: float
    doubtful: bool = False


def _scale(lengths: Tensor, of: Moments) -> Tensor:
    """By what columns are divided. What is left of a constant one are roundings of its mean: it becomes 0."""
    return torch.where(lengths > 1e-14 * of.n**0.5 * of.mean.abs(), 1 / lengths, 0)


def basis(of: Moments) -> Basis:
    """From the Gram matrix."""
    scale = _scale(of.scatter.diagonal().clamp_min(0).sqrt(), of)
    values, vectors = torch.linalg.eigh(of.scatter * scale * scale[:, None])
    largest = float(values[-1])
    kept = values > CUT_OFF * largest
    if largest <= 0 or not bool(kept.any()):
        return Basis(vectors[:, :0], 1.0)
    values, vectors = values[kept], vectors[:, kept]
    share = float(values[0]) / largest
    return Basis(scale[:, None] * vectors / values.sqrt(), share**-0.5, share < DOUBTFUL)


def basis_of_rows(x: Float[Tensor, "n d"], of: Moments) -> Basis:
    """The same by singular values of the rows themselves, which keeps twice the digits and takes several times as long.

    Singular values below max(n, d) x 2e-16 of the largest count as zero.
    """
    wide = x.double() - of.mean
    scale = _scale(wide.norm(dim=0), of)
    _, values, vectors = torch.linalg.svd(wide * scale, full_matrices=False)
    kept = values > max(x.shape) * torch.finfo(torch.float64).eps * values[0]
    if not bool(kept.any()):
        return Basis(vectors.T[:, :0], 1.0)
    values, vectors = values[kept], vectors[kept]
    return Basis(scale[:, None] * vectors.T / values, float(values[0] / values[-1]))


def fit(moments: PairMoments, found: Basis | None = None) -> LinearMap:
    """A*, the least-squares map of smallest norm in scaled columns."""
    whitener = (found or basis(moments.x)).whitener
    return LinearMap(whitener @ (whitener.T @ moments.cross), moments.x.mean, moments.mean_y)


def score_of(moments: PairMoments, held_out: float = float("nan"), found: Basis | None = None) -> Linearity:
    """From moments.

    Args:
        moments: Of pairs (x, y), or their `difference()` for the main contribution.
        held_out: To be put down beside it.
        found: The basis of X if it is there already.

    Raises:
        BadInputError: If there are fewer than two rows, or y does not vary, so that there is nothing to explain.
    """
    found = basis(moments.x) if found is None else found
    explained = (found.whitener.T @ moments.cross).square().sum()
    return _scores(float(explained), float(moments.spread_y), moments.n, found, held_out)


def _scores(explained: float, total: float, n: float, found: Basis, held_out: float) -> Linearity:
    if n < 2 or not total > 0:
        raise BadInputError(f"linearity needs two rows and a y that varies; got {n:g} rows, spread {total:g}")
    rank, left = found.whitener.shape[1], 1 - explained / total
    return Linearity(1 - left, adjusted(1 - left, n, rank), held_out, n, rank, found.condition)


def adjusted(score: float, n: float, rank: int) -> float:
    """1 - (1 - score) (n - 1) / (n - 1 - rank); NaN where n - 1 <= rank."""
    spare = n - 1 - rank
    return 1 - (1 - score) * (n - 1) / spare if spare > 0 else float("nan")


def residual(fitted: LinearMap, moments: PairMoments) -> tuple[float, float]:
    """Of rows given by their moments: sum ||y_i - map(x_i)||^2, and sum ||y_i - the map's mean_y||^2."""
    apart, apart_y = moments.x.mean - fitted.mean_x, moments.mean_y - fitted.mean_y
    through = fitted.weight.T @ moments.x.scatter
    inner = (through * fitted.weight.T).sum() - 2 * (fitted.weight * moments.cross).sum() + moments.spread_y
    left = inner + moments.n * (apart @ fitted.weight - apart_y).square().sum()
    return float(left), float(moments.spread_y + moments.n * apart_y.square().sum())


def cross_fits(folds: Sequence[PairMoments]) -> list[LinearMap]:
    """Per fold the map fitted to all others.

    Raises:
        BadInputError: If there are fewer than two folds, or all rows are in one.
    """
    if len(folds) < 2 or max(fold.n for fold in folds) == sum(fold.n for fold in folds):
        raise BadInputError(
            f"a held-out score fits on some folds and scores on others, but of {len(folds)} "
            f"only {sum(fold.n > 0 for fold in folds)} have rows; deal out samples to at least two"
        )
    every = range(len(folds))
    return [fit(combine(folds, [float(other != fold) for other in every])) for fold in every]


def held_out_score(folds: Sequence[PairMoments], maps: Sequence[LinearMap] | None = None) -> float:
    """Cross-validated 1 - sum of residuals / sum of spreads, every fold scored by the map of the others, from moments.

    Args:
        folds: Moments of the rows of each fold. Rows of one sample belong into one fold: rows of one picture, or of
            one prompt, are not independent, and would tell the map about each other.
        maps: `cross_fits(folds)`, if they are there already.

    Raises:
        BadInputError: See `cross_fits`; or if y does not vary.
    """
    sums = [residual(fitted, fold) for fitted, fold in zip(maps or cross_fits(folds), folds, strict=True)]
    left, total = (sum(column) for column in zip(*sums, strict=True))
    if not total > 0:
        raise BadInputError("y does not vary, so there is nothing to explain; give other rows")
    return 1 - left / total


def folds_of(samples: Tensor, folds: int = 5, seed: int = 0) -> Tensor:
    """Per row the number of its fold: samples dealt out evenly, in an order drawn by the seed.

    Args:
        samples: (n,), the sample of each row.
        folds: At least two.
        seed: Of the order.
    """
    _, number = samples.unique(return_inverse=True)
    count = int(number.max()) + 1 if len(number) else 0
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    fold = torch.empty(count, dtype=torch.long)
    fold[order] = torch.arange(count) % folds
    return fold.to(number.device)[number]


def linearity(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n e"],
    *,
    main: bool = False,
    samples: Tensor | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Linearity:
    """Of rows in memory.

    Args:
        x: Residual stream after layer l, of any floating dtype.
        y: The same positions after layer l + 1: the residual stream itself, not the normed last state.
        main: Of y - x instead of y.
        samples: (n,), the sample of each row: adds the held-out score, cross-validated with samples kept together.
        folds: For it.
        seed: Of the folds.

    Raises:
        BadInputError: If shapes do not fit, values are not finite, or y does not vary.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or (main and x.shape != y.shape):
        raise BadInputError(f"x {tuple(x.shape)} and y {tuple(y.shape)} are not rows of the same positions")
    if samples is None:
        whole, outside = pair_moments(x, y), float("nan")
        whole = whole.difference() if main else whole
    else:
        if samples.shape != (len(x),):
            raise BadInputError(
                f"samples of shape {tuple(samples.shape)} do not name a sample for each of {len(x)} rows"
            )
        fold = folds_of(samples, folds, seed).to(x.device)
        parts = [pair_moments(x[fold == number], y[fold == number]) for number in range(folds)]
        parts = [part.difference() for part in parts] if main else parts
        whole, outside = combine(parts), held_out_score(parts)
    found = basis(whole.x)
    if not found.doubtful:
        return score_of(whole, outside, found)
    found = basis_of_rows(x, whole.x)
    # X is whitened before it meets Y: in X^T Y the roundings of large columns would drown the small ones.
    white = (x.double() - whole.x.mean) @ found.whitener
    target = (y.double() - x.double() if main else y.double()) - whole.mean_y
    return _scores(float((white.T @ target).square().sum()), float(whole.spread_y), whole.n, found, outside)
