"""Small made-up studies of shifts: random rows of two models, words that are told by the largest coordinates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.grounding import Word
from concept_dict.kmeans import KMeans
from concept_dict.recovery import FORMS, SCORES, Recovery
from concept_dict.shift_study import Part, Settings, ShiftStudy, study

ROWS, DIMS, SAMPLES = 60, 8, 30


def part(seed: int, same: bool = False) -> Part:
    """Sixty rows of thirty samples; the fine-tuned model's are the original's, or moved by some noise and a drift."""
    drawn = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(4, DIMS, generator=torch.Generator().manual_seed(99))
    group = torch.randint(4, (ROWS,), generator=drawn)
    original = centres[group] + torch.randn(ROWS, DIMS, generator=drawn)
    moved = original + centres[(group + 1) % 4] / 2 + torch.randn(ROWS, DIMS, generator=drawn) / 2
    return Part(original, original.clone() if same else moved, np.arange(ROWS) % SAMPLES)


def decode(directions: Tensor) -> list[list[Word]]:
    """Three words per direction: the numbers of its largest coordinates."""
    best = directions.topk(3, dim=1)
    return [[Word(f"w{index}", 0.5 / (place + 1)) for place, index in enumerate(row)] for row in best.indices.tolist()]


def sets(directions: Tensor) -> list[set[str]]:
    """The same as `recover` takes them."""
    return [{word.text for word in words} for words in decode(directions)]


def made_up(
    method: Decomposition | None = None, *, same: bool = False, words: bool = True, empty: bool = False
) -> tuple[ShiftStudy, Part]:
    """A study and the part that it was measured on; `empty`: the original's first concept has no rows in common."""
    parts = [part(seed, same) for seed in (1, 2, 3)]
    fitted = (KMeans(4, random_state=0) if method is None else method).fit(parts[0].original)
    shift = parts[1]
    if empty:
        kept = fitted.transform(shift.original).argmax(dim=1) != 0
        shift = Part(shift.original[kept], shift.tuned[kept], shift.sample[kept.numpy()])
    found = study(
        fitted, shift, parts[2], words=(sets, sets) if words else None, settings=Settings(samples=3, draws=2, enough=1)
    )
    return found, parts[2]


def with_enough(study: ShiftStudy, enough: int) -> ShiftStudy:
    """The same, where a concept needs so many rows to count."""
    return replace(study, settings=replace(study.settings, enough=enough))


def told(study: ShiftStudy) -> Recovery:
    """Scores that are easy to count with: .1, .2, ... per concept for what is not moved, with more for other forms."""
    k = study.k
    base = (1 + np.arange(k)) / 10
    more = {form: base + place / 100 for place, form in enumerate(FORMS)}
    more["shifted"] = np.array([0.5, 0.1, 0.5, np.nan])
    scores = {form: {score: own.copy() for score in SCORES} for form, own in more.items()}
    for score in ("explained", "row_cosine"):
        del scores["refitted"][score]
    return Recovery(np.array([2, 0, 1, -1]), np.array([30, 20, 19, 40]), np.array([20, 25, 40, 40]), scores)
