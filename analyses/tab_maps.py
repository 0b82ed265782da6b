"""What the explorer's tabs with maps over pictures have in common: pictures, words, bounds, and names of arrays.

What is drawn is bounded, so that a page stays legible for a hundred tokens of an answer; a note says what is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from analyses.lens_page import token_text
from analyses.map_overlay import SIDE, blended, scale_of, told
from analyses.picture_maps import PictureMap, picture_maps
from analyses.targets import token_ids
from hooked_mm.batch import Batch
from hooked_mm.connector import connector_map, connector_patterns
from hooked_mm.drawing import enlarge
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Note, Panel, Pick, Picture, Pictures
from hooked_mm.explorer.tab import Choice, View
from hooked_mm.hooked import HookedMM

MOST_MAPS = 32
"""Pictures at most."""

MOST_TOKENS = 32
"""Tokens of an answer that a backward pass each is spent on."""

MOST_ROWS = 60
"""Rows of a figure by tokens."""

MOST_WORDS = 400
"""Words of a prompt."""

MEAN = -1
"""The value of a control that chooses a token: the mean of all of them."""

SCALE = Choice(
    "scale",
    "Colours",
    [("each map in its own scale", "own"), ("all maps in one scale", "common")],
    "own",
    "in one scale, maps can be compared; in its own, a weak map shows too",
)

KIND = Choice("kind", "Of the token, explain", [("its logit", "logit"), ("its log-probability", "log_prob")], "logit")


@dataclass(frozen=True)
class Drawing:
    """Maps that are drawn together.

    Attributes:
        caption: What they are of.
        maps: A map per grid over the pictures.
        pick: What a click chooses.
    """

    caption: str
    maps: Sequence[PictureMap]
    pick: Pick | None = None


def map_arrays(name: str, maps: Sequence[PictureMap]) -> dict[str, Float[Tensor, "rows cols"]]:
    """Maps by names that say what they are of: `NAME-picture-0`, `NAME-picture-0-overview`."""
    return {f"{name}-picture-{one.picture}{'-overview' if one.overview else ''}": one.values for one in maps}


def position_maps(
    model: HookedMM, batch: Batch, values: Float[Tensor, "n p"], images: Sequence[Image.Image]
) -> list[list[PictureMap]]:
    """Rows of values at the positions of a batch of one sample, over its pictures; see `picture_maps`.

    Raises:
        BadInputError: If it is not known which place of the picture a position has.
    """
    connector = connector_map(model, batch) if batch.layout.kind == "resampled" and connector_patterns(model) else None
    return [picture_maps(model, batch, 0, row, images, connector) for row in values]


def drawn(
    drawings: Sequence[Drawing], images: Sequence[Image.Image], scale: str = "own", title: str = ""
) -> list[Panel]:
    """Maps over their pictures, and a note where there are more than `MOST_MAPS`.

    Args:
        drawings: In their order.
        images: The pictures, of any size; drawn with `map_overlay.SIDE` pixels at most.
        scale: `own`, or `common` of all maps that are given.
        title: Above them.

    Raises:
        BadInputError: If a value is infinite.
    """
    every = [one.values for drawing in drawings for one in drawing.maps]
    signed = any(bool((values < 0).any()) for values in every)
    ends = scale_of(*every, signed=signed) if scale == "common" and every else None
    # Large pictures are made smaller once, not once per map.
    small = [enlarge(image.convert("RGB"), SIDE) for image in images]
    pictures: list[Picture] = []
    for drawing in drawings:
        for one in drawing.maps:
            image, shown = images[one.picture], small[one.picture]
            across, down = shown.width / image.width, shown.height / image.height
            left, top, right, bottom = one.box
            box = (left * across, top * down, right * across, bottom * down)
            which = f", picture {one.picture + 1}" if len(images) > 1 else ""
            which += ", overview" if one.overview else ""
            if len(pictures) < MOST_MAPS:
                made = blended(shown, one.values, box, scale=ends, signed=signed)
                caption = f"{drawing.caption}{which}: {told(one.values, signed=signed)}"
                pictures.append(Picture(caption, made, drawing.pick))
    panels: list[Panel] = [Pictures(pictures, title)] if pictures else []
    if len(every) > len(pictures):
        panels.append(Note(f"{len(pictures)} of {len(every)} maps are drawn; all of them are in the arrays."))
    return panels


def lacking(asked: Asked, *, pictures: bool) -> View | None:
    """What is shown in the place of a view of an answer without words, or of pictures that there are none of."""
    if not asked.tokens:
        return View([Note("The answer has no words, so there is nothing to explain; ask something else.")])
    if pictures and not asked.images:
        return View([Note("There is no picture in this conversation, so there are no places in it to show.")])
    return None


def named(asked: Asked, tokens: Sequence[int]) -> list[str]:
    """Names of answer tokens, no two alike: the number, from 1, and the text."""
    return [f"{token + 1} {asked.word(token).strip() or repr(asked.word(token))}" for token in tokens]


def bounded(asked: Asked, most: int = MOST_TOKENS) -> tuple[tuple[int, ...], list[Panel]]:
    """The chosen tokens that are explained, and a note if that is not all of them."""
    if len(asked.tokens) <= most:
        return asked.tokens, []
    note = f"The first {most} of {len(asked.tokens)} chosen tokens are explained; choose others above to see them."
    return asked.tokens[:most], [Note(note)]


def token_choice(asked: Asked, tokens: Sequence[int], chosen: object) -> tuple[int, list[tuple[str, int]]]:
    """Which token is looked at, and the options there are: the mean, and every explained token.

    Args:
        asked: The question.
        tokens: Those that are explained.
        chosen: The control's value; one of an earlier question, which is no token of this answer, is the mean.
    """
    options = [("the mean of the tokens", MEAN), *zip(named(asked, tokens), tokens, strict=True)]
    return next((token for token in tokens if token == chosen), MEAN), options


def text_words(
    model: HookedMM, batch: Batch, values: Float[Tensor, " p"], mask: Bool[Tensor, " p"] | None = None
) -> list[tuple[str, float]]:
    """The text of a batch of one sample with a value each; where pictures stand, one entry with the sum of theirs.

    Args:
        model: The model.
        batch: Of an encoder-decoder, the part in which the text stands.
        values: One per position.
        mask: Only these positions; all but padding unless given.

    Returns:
        The last `MOST_WORDS` at most.
    """
    text = token_text(None if model.processor is None else model.tokenizer)
    ids, image = token_ids(batch)[0].tolist(), batch.mask("image")[0].tolist()
    there = (batch.mask()[0] if mask is None else mask.to(batch.modality.device) & batch.mask()[0]).tolist()
    numbers = batch.image_index[0].tolist() if batch.image_index.shape == batch.modality.shape else [-1] * len(ids)
    found: list[tuple[str, float]] = []
    pictures: dict[int, int] = {}
    for place, value in enumerate(values.detach().double().cpu().tolist()):
        if not there[place]:
            continue
        if not image[place]:
            found.append((text(ids[place]) if ids[place] >= 0 else "?", value))
        elif numbers[place] in pictures:
            at = pictures[numbers[place]]
            found[at] = (found[at][0], found[at][1] + value)
        else:
            pictures[numbers[place]] = len(found)
            found.append((f"[picture {numbers[place] + 1}]" if numbers[place] >= 0 else "[picture]", value))
    return found[-MOST_WORDS:]


def position_words(asked: Asked, positions: Int[Tensor, " n"]) -> list[str]:
    """The text of the tokens at some positions of the sequence with the answer; nothing where no token stands."""
    ids, text = token_ids(asked.answer_batch)[0], token_text(asked.model.tokenizer)
    return [text(one) if one >= 0 else "" for one in ids.cpu()[positions.cpu()].tolist()]


def top_words(words: Sequence[tuple[str, float]], count: int = 3) -> str:
    """The words of largest value, as text."""
    best = sorted((one for one in words if one[1] > 0), key=lambda one: -one[1])[:count]
    return ", ".join(f"{word.strip() or repr(word)} {value:.3f}" for word, value in best)


def percents(values: Float[Tensor, "rows cols"]) -> list[list[str]]:
    """Shares as whole percents; nothing for NaN."""
    return [["" if math.isnan(one) else f"{100 * one:.0f}" for one in row] for row in values.tolist()]


def shares_table(shares: Mapping[str, Float[Tensor, " n"]]) -> tuple[Tensor, list[str]]:
    """Shares by name as one table (n, names)."""
    return torch.stack([value.double() for value in shares.values()], dim=1), list(shares)
