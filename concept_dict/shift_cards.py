"""What a fine-tuning did to each concept, for people: original, shifted and fine-tuned form side by side.

What is shown is what was scored: words and samples of a form are those that `recovery.recover` compares, on the same
rows. `shift_report` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from concept_dict.cards import CardSample
from concept_dict.gains import counted
from concept_dict.grounding import Decode, Word
from concept_dict.recovery import Concepts, along, top_by_direction
from concept_dict.run_table import Setting, method_settings
from concept_dict.shift import movements
from concept_dict.shift_study import Part, ShiftStudy
from concept_dict.shift_tables import (
    fate_counts,
    figure,
    form_values,
    known_scores,
    partner_fate,
)
from hooked_mm.errors import BadInputError


@dataclass(frozen=True)
class Form:
    """A concept in one of its forms.

    Attributes:
        name: `original`, `shifted` or `fine-tuned`.
        words: Best first.
        samples: Those with the row that lies farthest along it, and how far; with what the model said whose rows they
            are.
        shared: Words that the fine-tuned form has too; of itself none.
    """

    name: str
    words: list[Word]
    samples: list[CardSample]
    shared: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ShiftCard:
    """One concept of the original.

    Attributes:
        index: Which.
        label: As people are shown it.
        forms: Original and shifted and, if it has a partner, fine-tuned.
        numbers: (name, value) pairs.
        cosines: Of Delta_k with what happened to each of its held-out rows.
    """

    index: int
    label: str
    forms: list[Form]
    numbers: list[tuple[str, str]]
    cosines: Float[np.ndarray, " n"]

    @property
    def title(self) -> str:
        """`concept 3: red, orange`; the label alone where nothing was decoded."""
        words = ", ".join(word.text for word in self.forms[0].words[:3])
        return f"concept {self.label}: {words}" if words else f"concept {self.label}"


@dataclass(frozen=True)
class Alone:
    """A concept that the other model has nothing for: its words, and why it stands here."""

    label: str
    words: list[Word]
    why: str


@dataclass(frozen=True)
class ShiftReport:
    """Cards with what they are about.

    Attributes:
        title: What it is.
        facts: (name, value) pairs shown at the top.
        study: Its numbers.
        cards: Concepts with rows.
        empty: Labels of those without.
        new: Concepts of the fine-tuned model that are new, or no concept's partner.
        lost: Concepts of the original that nothing is left of.
        names: What concepts are called in figures; None where nothing was decoded.
        settings: TensorBoard compares runs by these.
    """

    title: str
    facts: list[tuple[str, str]]
    study: ShiftStudy
    cards: list[ShiftCard]
    empty: list[str]
    new: list[Alone]
    lost: list[Alone]
    names: list[str] | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)


def build_report(
    study: ShiftStudy,
    measure: Part,
    *,
    decoders: tuple[Decode, Decode] | None = None,
    pictures: Callable[[int], list[Image.Image]] | None = None,
    texts: tuple[Sequence[str], Sequence[str]] | None = None,
    title: str = "Shift of concepts",
    facts: Sequence[tuple[str, str]] = (),
    hook: str = "",
    models: tuple[str, str] = ("", ""),
    count: int = 6,
) -> ShiftReport:
    """Gather what a person wants to see of a study.

    Args:
        study: Of which concepts.
        measure: The part that it was measured on; samples are taken from it.
        decoders: What directions decode to in the original and in the fine-tuned model; none leaves words out.
        pictures: The pictures of a sample by its number in `measure`; the first is shown.
        texts: What the original and the fine-tuned model said of each sample, by the same number.
        title: Of the report.
        facts: (name, value) pairs to show on top of its own.
        hook: Where rows were read.
        models: The names of both.
        count: Samples per form.

    Raises:
        BadInputError: If no sample is to be shown, or a text is missing.
    """
    if count < 1:
        raise BadInputError(f"count={count}; show at least one sample per form")
    last = int(measure.sample.max())
    for name, said in zip(("original", "fine-tuned model"), texts or (), strict=False):
        if len(said) <= last:
            raise BadInputError(f"{len(said)} texts of the {name}, but rows of sample {last}; give one per sample")
    shown = [number for number in range(study.k) if study.shifts.counts[number]]
    partner = study.recovery.partner[shown]
    # Name, directions of those shown, whose rows and words: 0 of the original, 1 of the fine-tuned model.
    kinds = [
        ("original", study.original.vectors[shown], 0),
        ("shifted", study.shifted[shown], 1),
        ("fine-tuned", study.tuned.vectors[partner], 1),
    ]
    words = {name: _decode(decoders, of, directions) for name, directions, of in kinds}
    rows = [one.float() - side.mean for one, side in zip(_both(measure), (study.original, study.tuned), strict=True)]
    samples = {
        name: _samples(directions, rows[of], measure.sample, count, pictures, texts[of] if texts else None)
        for name, directions, of in kinds
    }
    cosines = _row_cosines(study, measure)
    kept = counted(study.recovery, study.settings.enough)
    cards = []
    for place, number in enumerate(shown):
        theirs = frozenset(word.text for word in words["fine-tuned"][place])
        forms = [
            Form(name, words[name][place], samples[name][place], frozenset() if name == "fine-tuned" else theirs)
            for name, _, _ in kinds
            if name != "fine-tuned" or partner[place] >= 0
        ]
        numbers = _numbers(study, number)
        if not kept[number]:
            numbers.append(("in means", f"not counted: no partner, or fewer than {study.settings.enough} rows"))
        cards.append(ShiftCard(number, study.label(number), forms, numbers, cosines[number]))
    new, lost = _alone(study, decoders)
    names: list[str] | None = None
    if decoders is not None:
        names = [""] * study.k
        for place, number in enumerate(shown):
            names[number] = ", ".join(word.text for word in words["original"][place][:2])
    settings: dict[str, Setting] = {
        **method_settings(study.fitted),
        "alpha": study.settings.alpha,
        "average": study.settings.average,
        "hook": hook,
        "original": models[0],
        "fine-tuned": models[1],
    }
    about = [*_about(study, measure, hook, models), *facts]
    empty = [study.label(number) for number in study.empty]
    return ShiftReport(title, about, study, cards, empty, new, lost, names, settings)


def _both(part: Part) -> tuple[Tensor, Tensor]:
    return part.original, part.tuned


def _decode(decoders: tuple[Decode, Decode] | None, of: int, directions: Float[Tensor, "k d"]) -> list[list[Word]]:
    return decoders[of](directions) if decoders is not None and len(directions) else [[] for _ in directions]


def _samples(
    directions: Float[Tensor, "k d"],
    rows: Float[Tensor, "n d"],
    sample: Int[np.ndarray, " n"],
    count: int,
    pictures: Callable[[int], list[Image.Image]] | None,
    texts: Sequence[str] | None,
) -> list[list[CardSample]]:
    """Per direction its most activating samples, as cards show them."""
    present, pooled = along(directions, rows, sample)
    row = {int(number): place for place, number in enumerate(present)}
    return [
        [
            CardSample(
                next(iter(pictures(number)), None) if pictures is not None else None,
                texts[number] if texts is not None else f"sample {number}",
                float(pooled[row[number], column]),
            )
            for number in best
        ]
        for column, best in enumerate(top_by_direction(directions, rows, sample, count))
    ]


def _row_cosines(study: ShiftStudy, measure: Part) -> list[Float[np.ndarray, " n"]]:
    """Per concept the cosine of each of its held-out rows' movement with Delta_k; 0 of those that did not move."""
    main = Concepts.of(study.fitted, measure.original, study.signed).main
    deltas = movements(*_both(measure))
    return [cosine_similarity(deltas[main == k], study.shifts.vectors[k], dim=1).numpy() for k in range(study.k)]


def _change(study: ShiftStudy, score: str, number: int) -> str:
    before, after = (float(form_values(study, score, form)[number]) for form in ("unshifted", "shifted"))
    return f"{figure(before)} → {figure(after)}"


def _numbers(study: ShiftStudy, number: int) -> list[tuple[str, str]]:
    """What a card says below the forms."""
    recovery, shifts = study.recovery, study.shifts
    fate = partner_fate(study, number)
    called = {"cosine": "cosine", "distance": "distance", "words": "T-overlap", "samples": "sample overlap"}
    changes = [(name, _change(study, score, number)) for score, name in called.items() if score in known_scores(study)]
    return [
        ("rows", str(int(recovery.counts[number]))),
        ("held-out rows", str(int(recovery.held_out[number]))),
        ("consistency", f"{figure(float(shifts.pairwise[number]))}, to mean {figure(float(shifts.to_mean[number]))}"),
        ("magnitude", figure(float(shifts.magnitude[number]))),
        *(changes if fate else []),
        ("partner", f"{study.tuned_label(int(recovery.partner[number]))}, {fate}" if fate else "none"),
    ]


def _alone(study: ShiftStudy, decoders: tuple[Decode, Decode] | None) -> tuple[list[Alone], list[Alone]]:
    """Concepts of the fine-tuned model without a counterpart, and of the original."""
    fates = study.fates
    partners = {int(number) for number in study.recovery.partner}
    theirs = [j for j, fate in enumerate(fates.fate) if fate == "new" or (fate and j not in partners)]
    new = [
        Alone(
            study.tuned_label(j),
            words,
            f"{fates.fate[j]}{'' if j in partners else ', no partner'}; nearest {study.label(int(fates.nearest[j]))}, "
            f"cosine {figure(float(fates.cosine[j]))}",
        )
        for j, words in zip(theirs, _decode(decoders, 1, study.tuned.vectors[theirs]), strict=True)
    ]
    why = f"no concept of the fine-tuned model has a cosine of {fates.apart:.2f} or more with it"
    gone = _decode(decoders, 0, study.original.vectors[fates.lost])
    return new, [Alone(study.label(k), words, why) for k, words in zip(fates.lost, gone, strict=True)]


def _about(study: ShiftStudy, measure: Part, hook: str, models: tuple[str, str]) -> list[tuple[str, str]]:
    settings, recovery = study.settings, study.recovery
    trim = f" ({settings.trim:g} at each end)" if settings.average == "trimmed" else ""
    found = [
        ("original", models[0]),
        ("fine-tuned", models[1]),
        ("representations", hook),
        ("dictionary", f"{study.fitted}"),
        ("shift", f"{settings.average}{trim} of the rows' movements, times {settings.alpha:g}"),
        (
            "rows",
            f"{int(recovery.counts.sum())} to shift by ({study.unassigned} more activate no concept), "
            f"{len(measure.sample)} of other samples ({len(np.unique(measure.sample))}) to measure on",
        ),
        ("fates", ", ".join(f"{number} {fate}" for fate, number in fate_counts(study))),
    ]
    return [(name, value) for name, value in found if value]
