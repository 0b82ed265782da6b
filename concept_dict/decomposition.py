"""What all decompositions Z ~ A C share: scikit-learn's conventions on torch tensors, step by step.

Z (n, d): representations; A (n, k): activations; C (k, d): concepts, of norm 1, so that A carries the size and the
largest activation names the main concept. Papers write Z ~ U V with samples in columns: their U is our C transposed,
their V our A transposed. Rows may be of any dtype, on any device, larger than memory, and shared out to processes (see
`rows`): all arithmetic is float32 or better.

`fit` is `begin`, `step` until it says that it is done, `end`; `learning` does the same with a Lightning Trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor
from tqdm import tqdm

from concept_dict.rows import Centred, Rows
from hooked_mm.errors import BadInputError


class Decomposition(TransformerMixin, BaseEstimator):
    """Base of the decompositions; subclasses implement `begin`, `step`, `end` and `activations`.

    Attributes (after `fit`):
        components_: C (k, d), rows of norm 1.
        mean_: (d,), subtracted from the rows first; zeros where `center` is off.
        reconstruction_err_: ||Z - mean - A C||_F, over the rows of all processes.
        n_iter_: Steps made.
        whitening_, directions_, sizes_: Of a fit with `whiten`: W (d, d), concepts (k, d) of norm 1 of the rows
            (Z - mean) W, and the norms that these have without W, (k,).
    """

    n_components: int
    center: bool
    whiten: float = 0.0
    components_: Float[Tensor, "k d"]
    mean_: Float[Tensor, " d"]
    reconstruction_err_: float
    n_iter_: int
    _rows: Centred
    SIGNED = False
    """Whether activations have signs, so that both ends of a concept mean something."""

    def fit(self, X: Tensor | np.ndarray | Rows, y: None = None) -> Self:
        """Find C for rows X (n, d): in a run of many processes, this process's share of them."""
        self.fit_transform(X)
        return self

    def fit_transform(self, X: Tensor | np.ndarray | Rows, y: None = None) -> Float[Tensor, "n k"]:
        """Find C for rows X (n, d), and return their activations A (n, k)."""
        self.begin(Rows.of(X))
        with tqdm(desc=type(self).__name__, unit="step", delay=2, leave=False) as bar:
            while not self.step():
                bar.update()
        return self.end()

    def begin(self, rows: Rows) -> None:
        """Check parameters, and make what `step` improves.

        Raises:
            BadInputError: For parameters that can't be, or that the rows do not allow.
        """
        raise NotImplementedError

    def step(self) -> bool:
        """Improve, once through all rows; true when there is nothing more to do."""
        raise NotImplementedError

    def end(self) -> Float[Tensor, "n k"]:
        """Set the fitted attributes; the activations of this process's rows."""
        active = self._end()
        rows = self._rows
        del self._rows
        return active if rows.whitening is None else self._to_the_rows_space(rows, rows.whitening, active)

    def _end(self) -> Float[Tensor, "n k"]:
        """The same in the space of the fit: of rows that are whitened, if they are."""
        raise NotImplementedError

    def start_from(self, fitted: Decomposition) -> Self:
        """Make the next fit begin where another one ended.

        Raises:
            BadInputError: If this method can't.
        """
        raise BadInputError(f"{type(self).__name__} can't start from what another fit found; leave the start out")

    def activations(self, chunk: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """Activations of rows in the space of the fit: without the mean, and whitened, if they are."""
        raise NotImplementedError

    @property
    def _axes(self) -> Float[Tensor, "k d"]:
        """Concepts in the space of the fit."""
        return getattr(self, "directions_", self.components_)

    def _to_the_rows_space(self, rows: Centred, whitening: Tensor, active: Tensor) -> Float[Tensor, "n k"]:
        """Concepts that add up to rows, not to whitened ones; their activations, and what these leave over."""
        self.whitening_, self.directions_ = whitening, self.components_
        wide = torch.linalg.solve(whitening.double(), self.directions_.double(), left=False)
        norms = wide.norm(dim=1)
        self.components_ = unit(wide.float())
        self.sizes_ = norms.float()
        active = self._sized(active)
        error = torch.zeros((), dtype=torch.float64, device=rows.device)
        for part, chunk in rows.rows.chunks():
            error += (chunk - self.mean_ - self._approximation(part, active)).double().square().sum()
        self.reconstruction_err_ = float(rows.processes.sum(error)) ** 0.5
        return active

    def _approximation(self, part: slice, active: Float[Tensor, "n k"]) -> Float[Tensor, "m d"]:
        """Some of this process's rows as their activations give them back, without the mean."""
        return active[part] @ self.components_

    def _sized(self, active: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
        """Coordinates along directions as coordinates along components."""
        return active * self.sizes_

    def progress(self) -> dict[str, float]:
        """What there is to say after a step, by name."""
        return {}

    def transform(self, X: Tensor | np.ndarray | Rows) -> Float[Tensor, "n k"]:
        """Activations of rows X (n, d) for the fitted concepts, row by row."""
        self.check_fitted()
        rows = Rows.of(X)
        if rows.width != self.components_.shape[1]:
            raise BadInputError(
                f"rows have width {rows.width}, the concepts {self.components_.shape[1]}; they must agree"
            )
        parts = [self._of_rows(chunk - self.mean_ if self.center else chunk) for _, chunk in rows.chunks()]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.components_), device=rows.device)

    def _of_rows(self, chunk: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        if not hasattr(self, "whitening_"):
            return self.activations(chunk)
        return self._sized(self.activations(chunk @ self.whitening_))

    def inverse_transform(self, activations: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        """Rows from activations: A C + mean."""
        self.check_fitted()
        return activations @ self.components_ + self.mean_

    def check_fitted(self) -> None:
        """Raise scikit-learn's `NotFittedError` before `fit`."""
        if not hasattr(self, "components_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet; call fit first")

    def _centred(self, rows: Rows) -> Centred:
        """The rows to work on; sets `mean_`."""
        if not 1 <= self.n_components <= rows.total:
            raise BadInputError(
                f"n_components={self.n_components} needs to be between 1 and the number of rows, {rows.total}"
            )
        if not 0 <= self.whiten <= 1:
            raise BadInputError(f"whiten={self.whiten}; it must be between 0 (rows as they are) and 1 (fully whitened)")
        for name in ("whitening_", "directions_", "sizes_"):
            if hasattr(self, name):
                delattr(self, name)
        centred = rows.centred(self.center, self.whiten)
        self.mean_ = centred.mean
        return centred

    def _measure(self, rows: Centred, solve: Callable[[slice, Tensor], Tensor] | None = None) -> Float[Tensor, "n k"]:
        """The activations of this process's rows, by `activations` unless told how; sets `reconstruction_err_`."""
        found = torch.zeros(rows.count, len(self.components_), device=rows.device)
        error = torch.zeros((), dtype=torch.float64, device=rows.device)
        for part, chunk in rows.chunks():
            found[part] = self.activations(chunk) if solve is None else solve(part, chunk)
            rest = chunk - found[part] @ self.components_
            error += torch.linalg.vector_norm(rest, dtype=torch.float64).square()
        self.reconstruction_err_ = float(rows.processes.sum(error)) ** 0.5
        return found

    def _check_at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise BadInputError(f"{name}={getattr(self, name)}; it must be at least 1")

    def _check_start(self, start: Tensor, width: int) -> None:
        found, needed = tuple(start.shape), (self.n_components, width)
        if found != needed:
            raise BadInputError(f"init has shape {found}, the concepts need {needed}")

    def _check_options(self, **options: tuple[Any, ...]) -> None:
        for name, known in options.items():
            if getattr(self, name) not in known:
                raise BadInputError(
                    f"{name}={getattr(self, name)!r}; it must be {' or '.join(repr(option) for option in known)}"
                )


def unit(directions: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """The same directions with norm 1; zeros stay."""
    return directions / directions.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def generator(random_state: int | None, processes: int = 1) -> torch.Generator:
    """A seeded torch generator on the CPU, the same in all processes; None takes a fresh seed.

    Raises:
        BadInputError: For None where several processes have to draw the same numbers.
    """
    made = torch.Generator()
    if random_state is not None:
        return made.manual_seed(random_state)
    if processes > 1:
        raise BadInputError("random_state=None draws other numbers in every process; give a seed")
    made.seed()
    return made
