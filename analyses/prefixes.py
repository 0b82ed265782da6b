"""What stands before each row: the tokens of its own sample at earlier positions, read off the rows that keep them.

Image positions hold no token and are left out of prefixes, not counted as placeholders: a run of 576 equal ones can be
said by heart, and would make every loss per token look small. What is to be reconstructed is text, wherever images
stand in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mm.errors import BadInputError

UNKNOWN, PAD = 0, -100
"""A token that training rows do not have; and what a shorter prefix of a batch is filled up with."""

IntArray = Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Prefixes:
    """The prefixes of rows.

    Attributes:
        names: The tokens; `names[0]` stands for all that training does not have.
        tokens: Numbers of the tokens of all samples, one sample after the other.
        starts, stops: Per row its prefix, as a stretch of `tokens`.
        cut: Rows whose prefix is longer than was asked for, so that only its end is there.
    """

    names: list[str]
    tokens: IntArray
    starts: IntArray
    stops: IntArray
    cut: int

    @classmethod
    def of(
        cls,
        words: Sequence[str | None],
        samples: IntArray,
        positions: IntArray,
        known: Bool[np.ndarray, " s"],
        longest: int = 64,
    ) -> Prefixes:
        """Those of rows, in any order.

        Args:
            words: Per row its token; None for an image position.
            samples: Per row its sample.
            positions: Per row its position in the sample.
            known: Per sample, whether its tokens make up the vocabulary (training).
            longest: Of a longer prefix, so many tokens at its end.

        Raises:
            BadInputError: If there are no tokens, or two rows of one sample have the same position.
        """
        said = np.array([word is not None for word in words], dtype=bool)
        if not said.any() or longest < 1:
            raise BadInputError(
                f"{int(said.sum())} rows have tokens, longest={longest}; extract with --selector EachOf "
                "--selector.tokens true, and ask for one token at least"
            )
        order = np.lexsort((positions, samples))
        twice = (np.diff(samples[order]) == 0) & (np.diff(positions[order]) == 0)
        if twice.any():
            row = int(order[int(twice.argmax())])
            raise BadInputError(
                f"position {positions[row]} of a sample is there twice, so that prefixes can't be read off the rows; "
                "narrow them with --where '{selector: EachOf}'"
            )
        names = ["", *sorted({word for word, sample in zip(words, samples, strict=True) if word and known[sample]})]
        number = {name: place for place, name in enumerate(names)}
        spoken = order[said[order]]
        tokens = np.array([number.get(words[row] or "", UNKNOWN) for row in spoken], dtype=int)
        before = np.cumsum(said[order]) - said[order]
        stops = np.empty(len(words), dtype=int)
        stops[order] = before
        first = np.searchsorted(samples[spoken], samples)
        starts = np.maximum(first, stops - longest)
        return cls(names, tokens, starts, stops, int((starts > first).sum()))

    def lengths(self) -> IntArray:
        """Per row, tokens in its prefix."""
        return self.stops - self.starts

    def batch(self, rows: IntArray) -> Int[Tensor, "m t"]:
        """The prefixes of some rows, filled up with `PAD` behind their ends."""
        starts, lengths = self.starts[rows], self.lengths()[rows]
        place = np.arange(lengths.max(initial=0))
        inside = place < lengths[:, None]
        found = self.tokens[np.where(inside, starts[:, None] + place, 0)]
        return torch.from_numpy(np.where(inside, found, PAD))

    def differ(self, rows: IntArray, size: int = 4096) -> bool:
        """Whether two of some rows have different prefixes: where none have, there is nothing to remember."""
        first = self.batch(rows[:1])
        return any(
            len(set(self.lengths()[part].tolist())) > 1 or not bool((self.batch(part) == first).all())
            for part in (np.concatenate([rows[:1], rows[start : start + size]]) for start in range(0, len(rows), size))
        )
