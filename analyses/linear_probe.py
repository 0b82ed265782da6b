"""Linear probes with control tasks: what can be read off a representation, and what of that is learning by heart.

Hewitt and Liang (2019), "Designing and interpreting probes with control tasks", D19-1275. The control task gives every
*type* (a word, a patch position) one label at random, drawn from the true labels' distribution and the same in
training and test: a probe can only learn it by heart.

    selectivity = accuracy on the task - accuracy of an equal probe on the control task

Beside them: the *majority* label's accuracy, and that of a probe whose labels were *shuffled*. Samples are dealt out to
training, validation (where the penalty is chosen, for each task its own) and test, see `splits`.

The probe is ridge regression on labels of -1 and 1, highest output wins (scikit-learn's `RidgeClassifier`), on features
standardised on the training rows. Penalties are per training row: sum of squared errors / n + penalty |W|^2. It needs
nothing but sums over rows, X^T X (d, d) and X^T Y (d, labels): rows are read a chunk at a time, however many there are,
and all tasks and penalties share one pass and one eigendecomposition. (Hewitt and Liang fit a softmax by gradient
steps, which has no closed form.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from analyses.by_sample import ratio_by_sample
from analyses.splits import PARTS, Part
from hooked_mm.errors import BadInputError

IntArray = Int[np.ndarray, " n"]
Read = Callable[[IntArray], Tensor]
"""Rows by their numbers, (m, d), of any dtype."""

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Per training row, of the squared weights of standardised features."""

HELD = 2**23
"""Numbers of float64 that are held of the rows at a time (64 MB)."""


def control_labels(types: IntArray, labels: IntArray, seed: int = 0) -> IntArray:
    """Per row the random label of its type, drawn from the distribution of the true labels over rows.

    Args:
        types: Per row the number of its type.
        labels: Per row its true label.
        seed: Of the drawing.
    """
    names, places = np.unique(types, return_inverse=True)
    return np.random.default_rng(seed).choice(labels, size=len(names))[places]


def shuffled_labels(labels: IntArray, samples: IntArray, part: Bool[np.ndarray, " n"], seed: int = 0) -> IntArray:
    """The labels of some rows in another order: over samples where each sample has one label, else over rows.

    Args:
        labels: Per row its label.
        samples: Per row its sample.
        part: The rows to shuffle; the others keep theirs.
        seed: Of the order.
    """
    rng, found = np.random.default_rng(seed), labels.copy()
    _, first, places = np.unique(samples[part], return_index=True, return_inverse=True)
    own = labels[part]
    if (own[first][places] == own).all():
        found[part] = rng.permutation(own[first])[places]
    else:
        found[part] = rng.permutation(own)
    return found


@dataclass(frozen=True)
class Fitted:
    """A probe on one task.

    Attributes:
        penalty: The best of those tried, by accuracy on the validation rows; of equals the largest.
        validation: That accuracy.
        predicted: Per test row the label.
    """

    penalty: float
    validation: float
    predicted: IntArray


def fit(
    read: Read,
    tasks: Mapping[str, IntArray],
    parts: Mapping[Part, IntArray],
    penalties: Sequence[float] = PENALTIES,
) -> dict[str, Fitted]:
    """A probe for every task, from one pass over the training rows, one over the validation and one over the test rows.

    Args:
        read: Gives rows.
        tasks: Name -> per row of the whole table its label, from 0.
        parts: Numbers of the rows for training, validation and test.
        penalties: To choose from.

    Raises:
        BadInputError: If a part has no rows, a row is not finite, or penalties are not positive.
    """
    empty = [part for part in PARTS if not len(parts[part])]
    if empty:
        raise BadInputError(f"there are no rows for {empty[0]}; take more samples")
    if not penalties or min(penalties) <= 0:
        raise BadInputError(f"penalties={list(penalties)}; give one at least, all above 0")
    classes = {name: np.unique(labels[parts["train"]]) for name, labels in tasks.items()}
    ridge = _Ridge(read, tasks, classes, parts["train"])
    every = torch.stack([ridge.weights(penalty) for penalty in penalties])
    right = {name: np.zeros(len(penalties)) for name in tasks}
    for rows, scores in ridge.scores(read, parts["validation"], every):
        for name, labels in tasks.items():
            right[name] += (ridge.label(name, scores) == labels[rows]).sum(axis=1)
    best = {name: max(range(len(penalties)), key=lambda p: (right[name][p], penalties[p])) for name in tasks}
    said: dict[str, list[np.ndarray]] = {name: [] for name in tasks}
    for _, scores in ridge.scores(read, parts["test"], every):
        for name, place in best.items():
            said[name].append(ridge.label(name, scores[place : place + 1])[0])
    count = len(parts["validation"])
    return {
        name: Fitted(float(penalties[place]), float(right[name][place] / count), np.concatenate(said[name]))
        for name, place in best.items()
    }


class _Ridge:
    """Sums over the training rows, and what they are solved to; every label of every task has a column of weights."""

    def __init__(
        self, read: Read, tasks: Mapping[str, IntArray], classes: Mapping[str, IntArray], rows: IntArray
    ) -> None:
        self.classes, self.count = classes, len(rows)
        stops = np.cumsum([0, *(len(found) for found in classes.values())])
        self.columns = {name: slice(a, b) for name, a, b in zip(classes, stops[:-1], stops[1:], strict=True)}
        width = read(rows[:0]).shape[1]
        device = read(rows[:1]).device
        total, squares = (
            torch.zeros(*shape, dtype=torch.float64, device=device) for shape in ((width,), (width, width))
        )
        both = torch.zeros(width, int(stops[-1]), dtype=torch.float64, device=device)
        target_sum = torch.zeros(int(stops[-1]), dtype=torch.float64, device=device)
        for own, values in _chunks(read, rows):
            truth = [labels[own][:, None] == classes[name] for name, labels in tasks.items()]
            targets = 2 * torch.from_numpy(np.concatenate(truth, axis=1)).to(values) - 1
            total += values.sum(0)
            squares += values.T @ values
            both += values.T @ targets
            target_sum += targets.sum(0)
        self.mean, self.targets = total / self.count, target_sum / self.count
        spread = (squares.diagonal() / self.count - self.mean.square()).clamp_min(0).sqrt()
        # A feature that does not vary, up to rounding, is left at nothing instead of being blown up.
        self.scale = torch.where(spread > 1e-7 * self.mean.abs(), spread, torch.inf)
        products = (squares - self.count * torch.outer(self.mean, self.mean)) / torch.outer(self.scale, self.scale)
        self.values, self.vectors = torch.linalg.eigh(products)
        toward = (both - self.count * torch.outer(self.mean, self.targets)) / self.scale[:, None]
        self.toward = self.vectors.T @ toward

    def weights(self, penalty: float) -> Float64[Tensor, "d labels"]:
        """W for standardised features: (X^T X + n penalty)^-1 X^T Y."""
        return self.vectors @ (self.toward / (self.values.clamp_min(0) + self.count * penalty)[:, None])

    def scores(
        self, read: Read, rows: IntArray, weights: Float64[Tensor, "p d labels"]
    ) -> Iterator[tuple[IntArray, Float64[Tensor, "p m labels"]]]:
        """The outputs for rows, chunk by chunk, with their numbers."""
        for own, values in _chunks(read, rows):
            yield own, (values - self.mean) / self.scale @ weights + self.targets

    def label(self, name: str, scores: Float64[Tensor, "p m labels"]) -> Int[np.ndarray, "p m"]:
        """The label with the highest output."""
        return self.classes[name][scores[..., self.columns[name]].argmax(dim=-1).cpu().numpy()]


def _chunks(read: Read, rows: IntArray) -> Iterator[tuple[IntArray, Float64[Tensor, "m d"]]]:
    """Rows as float64, some at a time, with their numbers."""
    size = max(1, HELD // max(1, read(rows[:0]).shape[1]))
    for start in range(0, len(rows), size):
        own = rows[start : start + size]
        values = read(own).double()
        if not bool(values.isfinite().all()):
            bad = int(own[int((~values.isfinite().all(1)).nonzero()[0, 0])])
            raise BadInputError(f"row {bad} of the representations is not finite; leave its sample out")
        yield own, values


@dataclass(frozen=True)
class Probed:
    """What probes of one layer reach on the test rows.

    Attributes:
        right: Per test row, whether the label is right: of the `task`, its `control`, `shuffled` training labels, and
            the `majority` label.
        samples: Per test row its sample.
        penalties: Of the task, the control and the shuffled labels.
        validation: Accuracies on the validation rows.
        counts: Rows per part, labels, and test rows whose label no training row has (they count as wrong).
    """

    right: dict[str, Bool[np.ndarray, " m"]]
    samples: IntArray
    penalties: dict[str, float]
    validation: dict[str, float]
    counts: dict[str, int]

    def accuracy(self, name: str = "task") -> float:
        """The share of test rows whose label is right."""
        return float(self.right[name].mean())

    @property
    def selectivity(self) -> float:
        """Accuracy on the task less accuracy on the control task."""
        return self.accuracy() - self.accuracy("control")

    def pseudo(self, name: str) -> Float64[Tensor, " s"]:
        """A value per sample: their mean is the accuracy (or the `selectivity`), their bootstrap one over samples."""
        if name == "selectivity":
            return self.pseudo("task") - self.pseudo("control")
        return ratio_by_sample(self.right[name], np.ones(len(self.samples)), self.samples)


def linear_probe(
    read: Read,
    labels: IntArray,
    types: IntArray,
    samples: IntArray,
    parts: Mapping[Part, Bool[np.ndarray, " s"]],
    *,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
) -> Probed:
    """Task, control task and shuffled labels on the rows of one layer.

    Args:
        read: Gives rows by number; for a tensor, `values.__getitem__`.
        labels: Per row its label, from 0; -1 for a row without one, which is left out.
        types: Per row its type, for the control task.
        samples: Per row its sample.
        parts: Per sample, whether it is for training, validation or test, see `splits.deal_out`.
        penalties: To choose from.
        seed: Of control labels and shuffling.

    Raises:
        BadInputError: If lengths differ, a sample is in two parts, or training knows fewer than two labels; see `fit`.
    """
    if not len(labels) == len(types) == len(samples):
        raise BadInputError(
            f"{len(labels)} labels, {len(types)} types, {len(samples)} samples; give one of each per row"
        )
    if (np.stack([parts[part] for part in PARTS]).sum(0) > 1).any():
        raise BadInputError("a sample is in two of training, validation and test; deal samples out anew")
    rows = {part: np.flatnonzero(parts[part][samples] & (labels >= 0)) for part in PARTS}
    known = np.unique(labels[rows["train"]])
    if len(known) < 2:
        raise BadInputError(
            f"training has {len(rows['train'])} rows with {len(known)} different labels; a probe needs two at least"
        )
    used = np.concatenate(list(rows.values()))
    control = np.full(len(labels), -1)
    control[used] = control_labels(types[used], labels[used], seed)
    in_training = np.zeros(len(labels), dtype=bool)
    in_training[np.concatenate([rows["train"], rows["validation"]])] = True
    tasks = {
        "task": labels,
        "control": control,
        "shuffled": shuffled_labels(labels, samples, in_training, seed),
    }
    fitted = fit(read, tasks, rows, penalties)
    test = rows["test"]
    right = {name: fitted[name].predicted == tasks[name][test] for name in tasks}
    right["majority"] = labels[test] == np.bincount(labels[rows["train"]]).argmax()
    counts: dict[str, int] = {part: len(found) for part, found in rows.items()}
    counts |= {
        "labels": len(known),
        "types": len(np.unique(types[used])),
        "without_label": int((labels < 0).sum()),
        "test_labels_unknown": int((~np.isin(labels[test], known)).sum()),
    }
    return Probed(
        right,
        samples[test],
        {name: one.penalty for name, one in fitted.items()},
        {name: one.validation for name, one in fitted.items()},
        counts,
    )
