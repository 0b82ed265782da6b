"""What all decompositions Z ~ A C share: scikit-learn's conventions on torch tensors.

Z (n, d): representations; A (n, k): activations; C (k, d): concepts, of norm 1, so that A carries the size and the
largest activation names the main concept. Papers write Z ~ U V with samples in columns: their U is our C transposed,
their V our A transposed. Rows may be of any dtype, on any device, and larger than memory allows as float32 (a memory
map): they are converted chunk by chunk, and all arithmetic is float32 or better.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from hooked_mm.errors import BadInputError

CHUNK = 16_384
"""Rows converted to float32 at a time."""


def as_rows(values: Tensor | np.ndarray) -> Tensor:
    """Rows as a tensor, (n, d).

    Raises:
        BadInputError: If there are not two dimensions, no rows, or values that are not finite.
    """
    rows = torch.as_tensor(values)
    if rows.ndim != 2 or not len(rows):
        raise BadInputError(f"representations must be (n, d) with n > 0; got shape {tuple(rows.shape)}")
    for start in range(0, len(rows), CHUNK):
        bad = ~torch.isfinite(rows[start : start + CHUNK]).all(dim=1)
        if bool(bad.any()):
            row = start + int(bad.nonzero()[0])
            raise BadInputError(f"row {row} of the representations is not finite; remove it before fitting")
    return rows


class Decomposition(TransformerMixin, BaseEstimator):
    """Base of the decompositions; subclasses implement `fit` and `transform`.

    Attributes (after `fit`):
        components_: C (k, d), rows of norm 1.
        mean_: (d,), subtracted from the rows first; zeros where `center` is off.
        reconstruction_err_: ||Z - mean - A C||_F.
        n_iter_: Iterations run.
    """

    center: bool
    components_: Float[Tensor, "k d"]
    mean_: Float[Tensor, " d"]
    reconstruction_err_: float
    n_iter_: int

    def fit(self, X: Tensor | np.ndarray, y: None = None) -> Self:
        """Find C for rows X (n, d)."""
        raise NotImplementedError

    def transform(self, X: Tensor | np.ndarray) -> Float[Tensor, "n k"]:
        """Activations of rows X (n, d) for the fitted concepts."""
        raise NotImplementedError

    def inverse_transform(self, activations: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        """Rows from activations: A C + mean."""
        self.check_fitted()
        return activations @ self.components_ + self.mean_

    def check_fitted(self) -> None:
        """Raise scikit-learn's `NotFittedError` before `fit`."""
        if not hasattr(self, "components_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet; call fit first")

    def _rows_to_transform(self, values: Tensor | np.ndarray) -> Tensor:
        self.check_fitted()
        rows = as_rows(values)
        if rows.shape[1] != self.components_.shape[1]:
            raise BadInputError(
                f"rows have width {rows.shape[1]}, the concepts {self.components_.shape[1]}; they must agree"
            )
        return rows

    def _chunks(self, rows: Tensor) -> Iterator[tuple[slice, Float[Tensor, "m d"]]]:
        """Float32 rows minus the mean, chunk by chunk."""
        for start in range(0, len(rows), CHUNK):
            part = slice(start, min(start + CHUNK, len(rows)))
            chunk = rows[part].float()
            # Where nothing is to be subtracted, float32 rows are used as they are, without a copy.
            yield part, chunk - self.mean_ if self.center else chunk

    def _set_mean(self, rows: Tensor) -> None:
        if self.center:
            total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
            for start in range(0, len(rows), CHUNK):
                total += rows[start : start + CHUNK].double().sum(0)
            self.mean_ = (total / len(rows)).float()
        else:
            self.mean_ = torch.zeros(rows.shape[1], device=rows.device)

    def _check_at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise BadInputError(f"{name}={getattr(self, name)}; it must be at least 1")

    def _check_k(self, k: int, rows: Tensor) -> None:
        if not 1 <= k <= len(rows):
            raise BadInputError(f"n_components={k} needs to be between 1 and the number of rows, {len(rows)}")


def generator(random_state: int | None, device: torch.device) -> torch.Generator:
    """A seeded torch generator; None takes a fresh seed."""
    made = torch.Generator(device=device)
    if random_state is None:
        made.seed()
    else:
        made.manual_seed(random_state)
    return made
