"""Position rules: which (row, position) of an activation something applies to, said in words instead of indices.

A rule is a small value: `Positions(modality="image")`, `Positions(role="question", index=-1) | LAST_PROMPT`, `~IMAGE`.
It is resolved against a `Layout`, so that it means the same in a forward pass, in every step of a generation, with
beams and with padding. Padding is chosen only by `modality="pad"`, also under `~`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mm.batch import Modality, Role, parse_modality, parse_role
from hooked_mm.errors import BadInputError, nearest
from hooked_mm.runner import Hook
from hooked_mm.value_layout import Layout, layout, whole_numbers


class PositionRule(ABC):
    """Chooses positions. Rules combine with `&`, `|` and `~`; equal rules are equal and hash alike."""

    @abstractmethod
    def mask(self, layout: Layout) -> Bool[Tensor, "r p"]:
        """The chosen positions, (rows, positions) of the layout's shape."""

    def resolve(self, hook: Hook, shape: Sequence[int]) -> Bool[Tensor, "r p"]:
        """The chosen positions of an activation of this shape, (rows, positions); a packed tower has one row.

        Raises:
            BadInputError: If the rule makes no sense there, an index does not exist, or the shape does not fit.
        """
        return self.mask(layout(hook, shape))

    def __and__(self, other: PositionRule) -> PositionRule:
        return _Both(self, other)

    def __or__(self, other: PositionRule) -> PositionRule:
        return _Either(self, other)

    def __invert__(self) -> PositionRule:
        return _Not(self)


@dataclass(frozen=True, repr=False)
class _Both(PositionRule):
    left: PositionRule
    right: PositionRule

    def mask(self, layout: Layout) -> Bool[Tensor, "r p"]:
        return self.left.mask(layout) & self.right.mask(layout)

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


@dataclass(frozen=True, repr=False)
class _Either(PositionRule):
    left: PositionRule
    right: PositionRule

    def mask(self, layout: Layout) -> Bool[Tensor, "r p"]:
        return self.left.mask(layout) | self.right.mask(layout)

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


@dataclass(frozen=True, repr=False)
class _Not(PositionRule):
    rule: PositionRule

    def mask(self, layout: Layout) -> Bool[Tensor, "r p"]:
        return (layout.modality != Modality.PAD) & ~self.rule.mask(layout)

    def __repr__(self) -> str:
        return f"~{self.rule!r}"


@dataclass(frozen=True, repr=False)
class Positions(PositionRule):
    """The positions that meet every condition given; without any, all but padding.

    Attributes:
        modality: `"image"`, `"text"` or `"pad"`.
        role: `"template"`, `"question"` or `"answer"`; generated tokens are `answer`.
        index: Of the sample's own tokens as given (padding not counted), or of an image's patches at tower points; one
            or several, negative ones count from the end. Generated tokens have no index.
        start: From this own token (or patch) on, generated tokens included; negative counts from the end of the given.
        last_prompt: Only the position from which the answer's first token is predicted.
        generated: True: only tokens generated in this run (step > 0); False: only what was given.
        sample: Only these samples of the batch, one or several, negative ones count from the end.
    """

    modality: str | Modality | None = None
    role: str | Role | None = None
    index: int | Sequence[int] | None = None
    start: int | None = None
    last_prompt: bool = False
    generated: bool | None = None
    sample: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, parse in (("modality", parse_modality), ("role", parse_role)):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else parse(value))
        for name in ("index", "sample"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else whole_numbers(name, value))

    def mask(self, layout: Layout) -> Bool[Tensor, "r p"]:
        """The chosen positions, (rows, positions) of the layout's shape.

        Raises:
            BadInputError: If the layout lacks what the rule asks for, or a sample does not have the index.
        """
        modality = layout.modality
        kept: Tensor = modality != Modality.PAD if self.modality is None else modality.eq(int(self.modality))
        chosen = kept.expand(layout.shape)
        if self.sample is not None:
            chosen = chosen & _among(layout, self.sample)
        if self.role is not None:
            role = layout.need("role", repr(self))
            if layout.has_given and self.role != Role.UNKNOWN and bool((role == Role.UNKNOWN).any()):
                raise BadInputError(
                    f"{self!r} was asked for, but this batch was made from raw tensors, so roles are unknown; make it "
                    "with model.prepare(...)"
                )
            chosen = chosen & (role == self.role)
        if self.last_prompt:
            chosen = chosen & layout.need("last_prompt", repr(self))
        if self.generated is not None:
            chosen = chosen & (layout.need("generated", repr(self)) == self.generated)
        if self.index is not None or self.start is not None:
            own, length = layout.need("own", repr(self)), layout.need("length", repr(self))
            if self.start is not None:
                chosen = chosen & (own >= (self.start if self.start >= 0 else length + self.start)) & (own >= 0)
            if self.index is not None:
                if layout.has_given:
                    self._check_index(layout, length)
                hits = torch.zeros_like(own, dtype=torch.bool)
                for index in _tuple(self.index):
                    hits = hits | (own == (index if index >= 0 else length + index))
                chosen = chosen & hits & (own >= 0) & (own < length)
        return chosen

    def _check_index(self, layout: Layout, length: Tensor) -> None:
        asked = _tuple(self.index)
        missing = (length <= max(asked)) | (length < -min(asked))
        missing = missing.expand(layout.shape) & (layout.modality != Modality.PAD)
        if self.sample is not None:
            missing = missing & _among(layout, self.sample)
        if not bool(missing.any()):
            return
        row, column = (int(item) for item in missing.nonzero()[0])
        sample = None if layout.sample is None else int(layout.sample.expand(layout.shape)[row, column])
        things = "patches" if layout.patches else "tokens"
        size = int(length.expand(layout.shape)[row, column])
        raise BadInputError(f"{self!r}: there are only {size} {things} at {layout.name!r}", sample)

    def __repr__(self) -> str:
        parts = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value == item.default:
                continue
            shown = repr(value.name.lower()) if isinstance(value, Modality | Role) else repr(value)
            parts.append(f"{item.name}={shown}")
        return f"Positions({', '.join(parts)})"


ALL = Positions()
"""Every position but padding."""
IMAGE = Positions(modality="image")
"""Image positions; at tower and projector points, all."""
TEXT = Positions(modality="text")
"""Text positions, generated ones included."""
QUESTION = Positions(role="question")
"""What the user says."""
LAST_PROMPT = Positions(last_prompt=True)
"""The position from which the answer's first token is predicted."""
PROMPT = Positions(generated=False)
"""Everything that was given, nothing that is generated."""
GENERATED = Positions(generated=True)
"""Only tokens generated in this run."""

_WORDS: dict[str, Positions] = {
    "all": ALL,
    "last_prompt": LAST_PROMPT,
    "prompt": PROMPT,
    "generated": GENERATED,
    **{item.name.lower(): Positions(modality=item) for item in Modality},
    **{item.name.lower(): Positions(role=item) for item in (Role.TEMPLATE, Role.QUESTION, Role.ANSWER)},
}

At = PositionRule | str | int | Sequence[int] | None
"""What is taken wherever positions are asked for; see `as_rule`."""


def as_rule(at: At) -> PositionRule:
    """A rule from its short form.

    Args:
        at: A rule; a word (`"all"`, `"image"`, `"text"`, `"pad"`, `"template"`, `"question"`, `"answer"`, `"prompt"`,
            `"last_prompt"`, `"generated"`); an index or several of the sample's own tokens; None for all.

    Raises:
        BadInputError: If it is none of these.
    """
    if at is None:
        return ALL
    if isinstance(at, PositionRule):
        return at
    if isinstance(at, str):
        if at not in _WORDS:
            raise BadInputError(f"no positions are called {at!r}{nearest(at, _WORDS)}; known: {', '.join(_WORDS)}")
        return _WORDS[at]
    return Positions(index=at)


def _tuple(value: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _among(layout: Layout, samples: int | Sequence[int]) -> Tensor:
    """Which positions belong to these samples."""
    sample = layout.need("sample", f"sample={samples!r}")
    chosen = torch.zeros_like(sample, dtype=torch.bool)
    for index in _tuple(samples):
        if not -layout.samples <= index < layout.samples:
            raise BadInputError(f"sample {index} was asked for in a batch of {layout.samples}")
        chosen = chosen | (sample == index % layout.samples)
    return chosen
