"""Patchscopes: a representation is put into another prompt, and the model itself says what it holds.

Ghandeharioun et al. 2024 (arXiv 2401.06102). h^l_i, the source's residual stream behind l blocks at position i,
replaces the target's stream behind l* blocks at position i*; what the model then generates is read:

    target:  h^{l*}_{i*} := h^l_i          (at the prompt only; what is generated reads it from the model's cache)

The paper's target makes the model repeat what it is given, `cat -> cat; 1135 -> 1135; hello -> hello; ?`, with h in the
place of the last token. A target must be of the model's own language: for models that answer questions alone, one whose
answer is the attribute in question, `what colour is the object ?` with h in the place of "object".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.logit_lens import lens_points
from hooked_mm.batch import Batch, Modality
from hooked_mm.cache import ActivationCache
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Replace
from hooked_mm.positions import Positions
from hooked_mm.words import check_words

IDENTITY = "cat -> cat ; 1135 -> 1135 ; hello -> hello ; ?"


@dataclass(frozen=True)
class Target:
    """A prompt that representations are put into.

    Attributes:
        batch: It alone, one sample.
        position: Which of its own tokens (padding not counted) is replaced.
    """

    batch: Batch
    position: int

    def __post_init__(self) -> None:
        length = int((self.batch.modality[0] != Modality.PAD).sum())
        if len(self.batch) != 1 or not -length <= self.position < length:
            raise BadInputError(
                f"a target is one prompt and one of its tokens; got {len(self.batch)} prompts and token "
                f"{self.position} of {length}"
            )


@dataclass(frozen=True)
class Source:
    """A representation to be read.

    Attributes:
        sample: Of the source's batch.
        position: Column of the batch.
        layer: Behind so many blocks; 0 is what enters the first.
    """

    sample: int
    position: int
    layer: int


def word_target(model: HookedMM, text: str, placeholder: str, image: object = None) -> Target:
    """A target whose position is where its text says a word last.

    Args:
        model: Whose template and tokenizer to use.
        text: What the user says.
        placeholder: The word to replace; the last token that spells it, or ends with it.
        image: A picture to stand before it, or None.

    Raises:
        UnknownWordError: If the tokenizer can't make a word of the text.
        BadInputError: If the text does not say the placeholder.
    """
    check_words(model.tokenizer, text.split())
    batch = model.prepare([image], [text])  # type: ignore[list-item]
    own = batch.mask(role="question")[0].nonzero()[:, 0].tolist()
    spelt = [model.tokenizer.decode([int(batch.input_ids[0, place])]).strip() for place in own]
    if placeholder not in spelt:
        raise BadInputError(f"{text!r} has no token {placeholder!r}; its tokens are {spelt}")
    place = own[len(spelt) - 1 - spelt[::-1].index(placeholder)]
    return Target(batch, int((batch.modality[0, :place] != Modality.PAD).sum()))


def injection(model: HookedMM, resid: Float[Tensor, "n d"], position: int, layer: int) -> Replace:
    """Puts one representation into each sample of a batch.

    Args:
        model: The model.
        resid: A row per sample.
        position: Which of the sample's own tokens is replaced.
        layer: Behind so many blocks.

    Raises:
        BadInputError: If there is no such layer.
    """
    ((_, name),) = lens_points(model.hook_names, layers=[layer]).items()
    return Replace(name, resid, at=Positions(index=position))


@torch.no_grad()
def read(
    model: HookedMM,
    resid: Float[Tensor, "n d"],
    target: Target,
    layer: int,
    *,
    max_new_tokens: int = 3,
    size: int = 128,
) -> list[str]:
    """What the model says of each representation.

    Args:
        model: The model.
        resid: Representations.
        target: What they are put into.
        layer: Behind so many blocks of the target.
        max_new_tokens: How much it says, at most.
        size: Representations in one pass.
    """
    said: list[str] = []
    for part in resid.split(size):
        with model.hooks([injection(model, part, target.position, layer)]):
            said += model.generate(target.batch.take([0] * len(part)), max_new_tokens).text
    return said


def patchscope(
    model: HookedMM,
    cache: ActivationCache,
    sources: Sequence[Source],
    target: Target,
    layer: int | None = None,
    *,
    max_new_tokens: int = 3,
    size: int = 128,
) -> list[str]:
    """What the model says of some of a run's representations; those for one target layer go together.

    Args:
        model: The model.
        cache: Of the sources' layers (`lens_points` names them).
        sources: Which representations.
        target: What they are put into.
        layer: Of the target; each source's own unless given.
        max_new_tokens: How much it says, at most.
        size: Representations in one pass.

    Returns:
        A text per source, in their order.

    Raises:
        BadInputError: If a layer does not exist.
        UnknownHookError: If a source's layer was not cached.
    """
    said, groups = [""] * len(sources), dict[int, list[int]]()
    for place, source in enumerate(sources):
        groups.setdefault(source.layer if layer is None else layer, []).append(place)
    for number, places in groups.items():
        points = lens_points(model.hook_names, layers={sources[place].layer for place in places})
        rows = [cache[points[one.layer]][one.sample, one.position] for one in (sources[place] for place in places)]
        found = read(model, torch.stack(rows), target, number, max_new_tokens=max_new_tokens, size=size)
        for place, text in zip(places, found, strict=True):
            said[place] = text
    return said
