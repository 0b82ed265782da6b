"""The shift of concepts from a model to its fine-tuned sibling, measured on samples that had no part in it.

Samples are dealt into three parts:

| part | what is computed from it |
|---|---|
| learn | the original's dictionary, unless one is given |
| shift | the groups A_k, the shift vectors, the concepts' sizes |
| measure | the fine-tuned model's dictionary, unless one is given; all scores |

In sample the recovery would be circular: the mean of a group, moved by the group's mean shift, *is* the mean of what
the fine-tuned model makes of that group.

Parts differ in their means by chance. So of centred dictionaries the fine-tuned model's mean, from which moved concepts
point, is that of the original and what rows moved by on average: it owes nothing to which samples a part has. Centring
takes a common drift out, and `global` (with alpha 1) then points and lies as `unshifted` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import clone
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.fates import Fates, fates
from concept_dict.gains import ENOUGH, Correlation, correlate, counted, gain, relative_gain
from concept_dict.grounding import is_signed
from concept_dict.recovery import Concepts, HeldOut, Recovery, Words, moves, recover
from concept_dict.shift import Average, Shifts, average, movements, shift_vectors
from hooked_mm.errors import BadInputError


@dataclass(frozen=True)
class Part:
    """Rows of both models in pairs.

    Attributes:
        original: Of the original.
        tuned: The same of the fine-tuned model.
        sample: The number of the sample each comes from, from 0; some may have no rows here.

    Raises:
        BadInputError: If a row has no sample.
    """

    original: Float[Tensor, "n d"]
    tuned: Float[Tensor, "n d"]
    sample: Int[np.ndarray, " n"]

    def __post_init__(self) -> None:
        if np.shape(self.sample) != (len(self.original),):
            raise BadInputError(
                f"{len(self.original)} rows, but samples of shape {np.shape(self.sample)}; give one number per row"
            )


@dataclass(frozen=True)
class Settings:
    """How shifts are computed and scored.

    Attributes:
        alpha: By what shifts are multiplied before they are added.
        average: Of the rows' movements, see `shift.average`.
        trim: See `shift.average`.
        samples: Most activating samples to compare.
        draws: Of every random control.
        apart: See `fates`.
        enough: Rows that a concept needs, see `gains.counted`.
        seed: Of the controls and the intervals.
    """

    alpha: float = 1.0
    average: Average = "mean"
    trim: float = 0.1
    samples: int = 10
    draws: int = 5
    apart: float = 0.5
    enough: int = ENOUGH
    seed: int = 0


@dataclass(frozen=True)
class ShiftStudy:
    """What a fine-tuning did to the concepts of one dictionary.

    Attributes:
        fitted: The original's dictionary.
        tuned_fitted: The fine-tuned model's.
        signed: Whether both ends of the original's concepts are concepts of their own, so that k is twice its own.
        original: The original's concepts, placed by the part `shift`.
        tuned: The fine-tuned model's, placed by the part `measure`; its mean see above.
        shifts: Delta_k and its consistency.
        recovery: Scores of every form.
        fates: What became of the concepts.
        correlations: Of `consistency` (pairwise) and `magnitude` with gains in cosine and distance, of
            concepts with enough rows.
        settings: As given.
    """

    fitted: Decomposition
    tuned_fitted: Decomposition
    signed: bool
    original: Concepts
    tuned: Concepts
    shifts: Shifts
    recovery: Recovery
    fates: Fates
    correlations: dict[str, Correlation]
    settings: Settings = field(default_factory=Settings)

    @property
    def k(self) -> int:
        """Number of concepts, both ends counted where they are told apart."""
        return len(self.shifts.vectors)

    @property
    def unassigned(self) -> int:
        """Rows of the part `shift` that activate no concept."""
        return int((self.original.main < 0).sum())

    @property
    def shifted(self) -> Float[Tensor, "k d"]:
        """The original's concepts, each moved by its own shift, from the fine-tuned model's mean."""
        return self.original.moved(self.settings.alpha * self.shifts.vectors, self.tuned)

    @property
    def empty(self) -> list[int]:
        """Concepts without rows in the part `shift`: they have no shift and no scores."""
        return [number for number, count in enumerate(self.shifts.counts.tolist()) if not count]

    def label(self, number: int) -> str:
        """The concept as people are shown it: `3`, or `3 +` and `3 −` for the ends of a signed one."""
        return self._label(number, self.k)

    def tuned_label(self, number: int) -> str:
        """The same of a concept of the fine-tuned model."""
        return self._label(number, len(self.tuned.directions))

    def _label(self, number: int, count: int) -> str:
        if not self.signed:
            return str(number)
        return f"{number % (count // 2)} {'+' if number < count // 2 else chr(0x2212)}"


def study(
    method: Decomposition,
    shift: Part,
    measure: Part,
    *,
    learn: Part | None = None,
    tuned: Decomposition | None = None,
    words: tuple[Words, Words] | None = None,
    settings: Settings = Settings(),
) -> ShiftStudy:
    """Compute shifts on one part of the samples and score them on another.

    Args:
        method: The original's dictionary, fitted; or not fitted, if there is a part to `learn` it from.
        shift: What shifts are computed from.
        measure: What they are measured on.
        learn: What the original's dictionary is learnt from.
        tuned: The fine-tuned model's dictionary; unless given, one with the settings of `method` is fitted.
        words: What directions decode to in the original and in the fine-tuned model; without, words are not compared.
        settings: How.

    Raises:
        BadInputError: If there are too few rows for the concepts, or rows are not in pairs.
        NotFittedError: If there is neither a fitted dictionary nor a part to learn one from.
    """
    fitted = clone(method).fit(learn.original) if learn is not None else method
    fitted.check_fitted()
    deltas = movements(shift.original, shift.tuned)
    movements(measure.original, measure.tuned)  # refuses what is not in pairs
    made = tuned if tuned is not None else clone(method).fit(measure.tuned)
    made.check_fitted()
    again, refitted = clone(method).fit(measure.original), clone(made).fit(shift.tuned)
    signed, theirs_signed = (is_signed(one.components_, one.mean_, one.transform) for one in (fitted, made))
    original = Concepts.of(fitted, shift.original, signed)
    theirs = Concepts.of(made, measure.tuned, theirs_signed)
    if bool(original.mean.any()) and bool(theirs.mean.any()):
        theirs = replace(theirs, mean=original.mean + average(deltas))
    shifts = shift_vectors(deltas, original.main, len(original.directions), settings.average, settings.trim)
    held = HeldOut(measure.original, measure.tuned, Concepts.of(fitted, measure.original, signed).main, measure.sample)
    recovery = recover(
        original,
        theirs,
        shifts,
        moves(
            shifts,
            deltas,
            original.main,
            settings.alpha,
            settings.draws,
            settings.seed,
            settings.average,
            settings.trim,
        ),
        held,
        refitted=Concepts.of(refitted, shift.tuned, theirs_signed),
        words=words,
        samples=settings.samples,
    )
    fate = fates(original, Concepts.of(again, measure.original, signed), theirs, settings.apart)
    measured = {"consistency": shifts.pairwise.numpy(), "magnitude": shifts.magnitude.numpy()}
    came = {
        "gain in cosine": gain(recovery, "cosine"),
        "relative gain in distance": relative_gain(recovery, "distance"),
    }
    kept = counted(recovery, settings.enough)
    correlations = {
        f"{one} with {other}": correlate(x[kept], y[kept], settings.seed)
        for one, x in measured.items()
        for other, y in came.items()
    }
    return ShiftStudy(fitted, made, signed, original, theirs, shifts, recovery, fate, correlations, settings)
