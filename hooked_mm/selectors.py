"""Which positions represent a sample: the token of interest, the last prompt token, a mean over image or answer.

A selector turns a batch into picks; a pick is one row of the activation store: the mean over its positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.word_classes import wanted
from hooked_mm.words import can_make, check_words, find_words


@dataclass(frozen=True)
class Pick:
    """One representation to keep: the positions of a sample it is the mean of, and the word it stands for, if any."""

    sample: int
    positions: tuple[int, ...]
    word: str | None = None


class Selector(ABC):
    """Chooses the positions whose representations are kept; a subclass is a dataclass of its settings."""

    @abstractmethod
    def __call__(self, batch: Batch, tokenizer: Any) -> list[Pick]:
        """The picks of a batch; a sample may have none or several."""

    def describe(self) -> dict[str, Any]:
        """The selector's name and settings, as the store writes them down."""
        return {"selector": type(self).__name__, **self.__dict__}


@dataclass(frozen=True)
class TokenOfInterest(Selector):
    """Whole words of the answer, given or generated.

    Attributes:
        words: The words or phrases.
        where: `"predicts"`: the position that predicts the word's first sub-token (where the model decides to say it);
            `"at"`: its last sub-token (where the model has read it).
        occurrences: `"all"`, or only the `"first"` of the words in each answer.
        word_class: A named list of words (see `word_classes`), beside `words`; those that the tokenizer can't make are
            left out.
    """

    words: Sequence[str] = ()
    where: Literal["predicts", "at"] = "predicts"
    occurrences: Literal["all", "first"] = "all"
    word_class: str | None = None

    def __post_init__(self) -> None:
        if not wanted(self.words, self.word_class):
            raise BadInputError("no words of interest; give words, or word_class")
        if self.where not in ("predicts", "at"):
            raise BadInputError(f"where={self.where!r}; it must be 'predicts' or 'at'")
        if self.occurrences not in ("all", "first"):
            raise BadInputError(f"occurrences={self.occurrences!r}; it must be 'all' or 'first'")

    def __call__(self, batch: Batch, tokenizer: Any) -> list[Pick]:
        check_words(tokenizer, self.words)
        words = [word for word in wanted(self.words, self.word_class) if can_make(tokenizer, word)]
        if not words:
            raise BadInputError(f"the tokenizer can't make any of the {self.word_class}; give words of its vocabulary")
        picks = []
        answer = batch.mask(role="answer")
        for sample in range(len(batch)):
            positions = answer[sample].nonzero()[:, 0].tolist()
            ids = batch.input_ids[sample, positions].tolist()
            found = find_words(tokenizer, ids, words) if ids else []
            for match in found[:1] if self.occurrences == "first" else found:
                position = positions[match.start] - 1 if self.where == "predicts" else positions[match.stop - 1]
                picks.append(Pick(sample, (position,), match.word))
        return picks


@dataclass(frozen=True)
class LastPrompt(Selector):
    """The last token of the prompt, from which the answer's first token is predicted."""

    def __call__(self, batch: Batch, tokenizer: Any) -> list[Pick]:
        return [Pick(sample, (int(position),)) for sample, position in enumerate(batch.last_prompt())]


@dataclass(frozen=True)
class MeanOver(Selector):
    """The mean over all positions of a modality or role, for instance `MeanOver(modality="image")`."""

    modality: str | None = None
    role: str | None = None

    def __call__(self, batch: Batch, tokenizer: Any) -> list[Pick]:
        chosen = batch.mask(self.modality, self.role)
        rows = [tuple(row.nonzero()[:, 0].tolist()) for row in chosen]
        return [Pick(sample, positions) for sample, positions in enumerate(rows) if positions]


@dataclass(frozen=True)
class EachOf(Selector):
    """Every position of a modality or role by itself, for instance `EachOf(modality="image")`; all without either.

    Attributes:
        modality: Of the positions; any unless given.
        role: Of text positions; any unless given.
        tokens: Keep the token at each position that is no image position, as its row's word.
    """

    modality: str | None = None
    role: str | None = None
    tokens: bool = False

    def __call__(self, batch: Batch, tokenizer: Any) -> list[Pick]:
        places = batch.mask(self.modality, self.role).nonzero().tolist()
        named = (batch.mask() & ~batch.mask("image")).tolist()
        return [
            Pick(sample, (at,), batch.tokens[sample][at] if self.tokens and named[sample][at] else None)
            for sample, at in places
        ]


@dataclass(frozen=True)
class AtIndex(Selector):
    """One position of every sample that has it, counted among its own from 0, or from the end if negative."""

    index: int

    def __call__(self, batch: Batch, tokenizer: Any) -> list[Pick]:
        picks = []
        for sample, row in enumerate(batch.mask()):
            own = row.nonzero()[:, 0].tolist()
            if -len(own) <= self.index < len(own):
                picks.append(Pick(sample, (own[self.index],)))
        return picks


@dataclass(frozen=True)
class BeforeSpecial(Selector):
    """The answer up to a special token (its end), where the model has said everything.

    Attributes:
        pool: `"last"`: the last token before the special one; `"mean"`: over all of the answer before it.
        tokens: Which tokens end an answer, as the tokenizer writes them; all its special ones unless given.
    """

    pool: Literal["last", "mean"] = "last"
    tokens: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.pool not in ("last", "mean"):
            raise BadInputError(f"pool={self.pool!r}; it must be 'last' or 'mean'")

    def __call__(self, batch: Batch, tokenizer: Any) -> list[Pick]:
        ending = set(tokenizer.all_special_ids)
        if self.tokens:
            known = tokenizer.get_vocab()
            lost = [token for token in self.tokens if token not in known]
            if lost:
                raise BadInputError(f"{lost[0]!r} is no token of this tokenizer, so no answer can end with it")
            ending = {known[token] for token in self.tokens}
        picks = []
        for sample, row in enumerate(batch.mask(role="answer")):
            answer = row.nonzero()[:, 0].tolist()
            ids = batch.input_ids[sample, answer].tolist()
            said = answer[: next((place for place, token in enumerate(ids) if token in ending), len(ids))]
            if said:
                picks.append(Pick(sample, tuple(said) if self.pool == "mean" else (said[-1],)))
        return picks


def gather(value: Float[Tensor, "b p d"], picks: Sequence[Pick]) -> Float[Tensor, "n d"]:
    """The mean of each pick's positions, (n, d), accumulated in float32 and returned in the value's dtype."""
    if not picks:
        return value.new_zeros(0, *value.shape[2:])
    rows = [value[pick.sample, list(pick.positions)].float().mean(0) for pick in picks]
    return torch.stack(rows).to(value.dtype)
