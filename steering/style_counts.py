"""How often captions speak of colours, places or feelings: what caption steering is meant to change.

Words are whole words in the form they are listed in ("red" is not in "scared", "beach" not in "beaches"); case does not
matter. The lists are `hooked_mm.word_classes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from hooked_mm.errors import BadInputError
from hooked_mm.word_classes import words_of
from hooked_mm.words import word_pattern

STYLES_OF_WORDS: dict[str, tuple[str, ...]] = {
    "colour": words_of("colours"),
    "place": words_of("places"),
    "sentiment": words_of("sentiments"),
}


class StyleCount(NamedTuple):
    """Captions with at least one word of a style, such words in all captions, and how many captions were looked at."""

    captions: int
    words: int
    of: int


def style_counts(
    captions: Sequence[str], styles: Mapping[str, Sequence[str]] = STYLES_OF_WORDS
) -> dict[str, StyleCount]:
    """Words of each style in captions.

    Args:
        captions: Texts.
        styles: The words of each style.

    Raises:
        BadInputError: If `captions` is one text, or a style has no words.
    """
    if isinstance(captions, str):
        raise BadInputError(f"captions={captions!r} is one text; write [{captions!r}]")
    counts = {}
    for name, words in styles.items():
        pattern = word_pattern(words)
        found = [sum(1 for _ in pattern.finditer(caption)) for caption in captions]
        counts[name] = StyleCount(sum(count > 0 for count in found), sum(found), len(captions))
    return counts


class StyleCounts(Metric):
    """`style_counts` of the captions of all processes."""

    full_state_update = False
    counts: Tensor

    def __init__(self, styles: Mapping[str, Sequence[str]] = STYLES_OF_WORDS, **options: Any) -> None:
        super().__init__(**options)
        self.styles = dict(styles)
        self.add_state("counts", torch.zeros(len(self.styles), 3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, captions: Sequence[str]) -> None:
        """Add captions.

        Raises:
            BadInputError: If `captions` is one text, or a style has no words.
        """
        found = list(style_counts(captions, self.styles).values())
        self.counts += torch.tensor(found, dtype=torch.int64, device=self.counts.device).reshape(-1, 3)

    def compute(self) -> dict[str, StyleCount]:
        """The counts of each style."""
        return {name: StyleCount(*row) for name, row in zip(self.styles, self.counts.tolist(), strict=True)}
