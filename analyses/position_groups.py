"""Groups of a sample's positions: what causal analyses patch, cut and report by.

| group | positions |
|---|---|
| `object` | image positions whose patch the object's mask covers by more than a share |
| `other patches` | all other image positions; `image`, where no mask is known |
| `subject` | words of the question that name the object |
| `question` | the rest of the question |
| `template` | what the chat template puts around both |
| `answer` | an answer's tokens before the one that is predicted |
| `last` | the row that predicts it: the prompt's last position, where nothing is answered yet |

Every position but padding and what comes behind `last` is in one group. A model that resamples pictures has latents
that belong to no place: there a latent counts as the object's by how much it takes from the object's patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from analyses.targets import token_ids
from hooked_mm.batch import Batch, Modality, Role
from hooked_mm.connector import Connector
from hooked_mm.errors import BadInputError
from hooked_mm.frames import Box, Framed, frame
from hooked_mm.positions import PositionRule
from hooked_mm.value_layout import Layout
from hooked_mm.words import find_words

Groups = dict[str, Bool[Tensor, "b p"]]
Mask = Bool[Tensor, "height width"] | Float[Tensor, "height width"]

SHARE = 0.1
"""How much of a patch an object must cover, unless told."""


@dataclass(frozen=True, eq=False, repr=False)
class Masked(PositionRule):
    """The positions of a mask over one forward pass; tokens that are generated behind them are never chosen.

    Attributes:
        own: (b, n) of each sample's own tokens in order, padding not counted; at tower points (images, n) of each
            image's patches in order, a leading class token counted. Made by `of_positions` and `of_patches`.
        patches: Which of the two.
    """

    own: Bool[Tensor, "b n"]
    patches: bool = False

    @classmethod
    def of_positions(cls, batch: Batch, mask: Bool[Tensor, "b p"]) -> Masked:
        """A rule for the text's points (an encoder-decoder's: its decoder's) from a mask over the batch's positions.

        Raises:
            BadInputError: If the mask is not of these positions.
        """
        text = batch.decoder or batch
        if mask.shape != text.modality.shape:
            raise BadInputError(f"a mask of {tuple(mask.shape)} for positions of {tuple(text.modality.shape)}")
        return cls(_in_order(mask, text.modality != Modality.PAD))

    @classmethod
    def of_patches(cls, batch: Batch, mask: Bool[Tensor, "rows places"]) -> Masked:
        """A rule for tower points from a mask over the rows of a tower's value (see `patch_positions`).

        Raises:
            BadInputError: If the mask does not fit the tower's rows.
        """
        owner = batch.layout.owners(*mask.shape).to(mask.device)
        images = [owner == image for image in range(len(batch.layout.image_sample))]
        kept = [mask[own] for own in images]
        width = max(map(len, kept), default=0)
        rule = mask.new_zeros(len(kept), width)
        for image, values in enumerate(kept):
            rule[image, : len(values)] = values
        return cls(rule, patches=True)

    def mask(self, layout: Layout) -> Bool[Tensor, "r p"]:
        """The chosen positions, (rows, positions) of the layout's shape.

        Raises:
            BadInputError: If the rule is for patches and these are tokens, or the other way round.
        """
        if layout.patches != self.patches:
            raise BadInputError(
                f"a mask over {_kind(self.patches)} was used at {layout.name!r}, {_kind(layout.patches)}"
            )
        number, row = (layout.need(name, "a mask") for name in ("own", "unit" if self.patches else "sample"))
        number, row = number.expand(layout.shape), row.expand(layout.shape)
        there = (number >= 0) & (number < self.own.shape[1]) & (row >= 0)
        own = self.own.to(number.device)
        return there & own[row.clamp_min(0), number.clamp(0, max(0, self.own.shape[1] - 1))]

    def __repr__(self) -> str:
        return f"Masked({self.own.sum(1).tolist()} of {_kind(self.patches)})"


def _kind(patches: bool) -> str:
    return "patches" if patches else "tokens"


def _in_order(mask: Bool[Tensor, "b p"], real: Bool[Tensor, "b p"]) -> Bool[Tensor, "b n"]:
    """A mask's values at each row's real places, in front."""
    number = (real.cumsum(1) - 1).clamp_min(0)
    made = torch.zeros_like(mask, dtype=torch.int)
    return made.scatter_add(1, number, (mask & real).int()) > 0


def coverage(mask: Mask, box: Box, grid: tuple[int, int]) -> Float[Tensor, "rows cols"]:
    """How much of each patch's area a mask on the picture covers, exactly, 0 to 1, in float64.

    Args:
        mask: Of the picture's pixels, each a square of its value.
        box: The part of the picture that the grid covers, in pixels; outside of the picture nothing is covered.
        grid: (rows, cols).

    Raises:
        BadInputError: If the mask is no picture, or box or grid have no extent.
    """
    left, top, right, bottom = box
    if mask.ndim != 2 or not mask.numel() or min(grid) < 1 or right <= left or bottom <= top:
        raise BadInputError(f"a mask of shape {tuple(mask.shape)} under a grid {grid} over the box {box}: no extent")
    down, across = (
        _overlap(start, end, count, size)
        for start, end, count, size in ((top, bottom, grid[0], mask.shape[0]), (left, right, grid[1], mask.shape[1]))
    )
    return down @ mask.double().cpu() @ across.T


def _overlap(start: float, end: float, count: int, pixels: int) -> Float[Tensor, "count pixels"]:
    """The share of each of `count` equal pieces of [start, end] that lies in each pixel."""
    edges = torch.linspace(start, end, count + 1, dtype=torch.float64)
    pixel = torch.arange(pixels, dtype=torch.float64)
    ends = torch.minimum(edges[1:, None], pixel + 1)
    return (ends - torch.maximum(edges[:-1, None], pixel)).clamp_min(0) / ((end - start) / count)


def _checked(batch: Batch, pictures: Sequence[Image.Image], masks: Sequence[Mask | None]) -> None:
    count = len(batch.layout.image_sample)
    if not len(pictures) == len(masks) == count:
        raise BadInputError(
            f"{len(pictures)} pictures and {len(masks)} masks for a batch of {count} images; give one of each per "
            "image, a mask may be None"
        )
    for image, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        if mask is not None and tuple(mask.shape) != picture.size[::-1]:
            raise BadInputError(
                f"image {image} has {picture.size[0]} x {picture.size[1]} pixels, its mask {tuple(mask.shape)} rows "
                "and columns; make the mask of the picture as it is given to the model"
            )


def object_positions(
    model: Framed,
    batch: Batch,
    pictures: Sequence[Image.Image],
    masks: Sequence[Mask | None],
    share: float = SHARE,
    connector: Connector | None = None,
) -> Bool[Tensor, "b p"]:
    """The image positions whose patches an object covers, in crops and overviews alike.

    Args:
        model: Whose patches.
        batch: What it is given.
        pictures: One per image, in batch order, as they were given.
        masks: The object's pixels in each; None where there is no object.
        share: A patch is the object's if the mask covers more than this share of it.
        connector: Of a model that resamples, how much each of its positions takes from each patch of the tower
            (`hooked_mm.connector.connector_map`): a latent is the object's if it takes more than this share of what it
            takes from the object.

    Raises:
        BadInputError: If images, pictures and masks do not correspond; if the image's positions belong to no place in
            the picture and `connector` is not given.
    """
    _checked(batch, pictures, masks)
    layout, found = batch.layout, torch.zeros_like(batch.modality, dtype=torch.bool)
    latents: list[int] = []
    for image, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        own = layout.images[image]
        if mask is not None and own.grid is None and own.overview is None:
            latents.append(image)
            continue
        for grid, overview in ((own.grid, False), (own.overview, True)):
            if mask is not None and grid is not None:
                sample = int(layout.image_sample[image])
                covered = _covered(model, picture, mask, grid, overview).to(grid.device) > share
                found[sample, grid[covered & (grid >= 0)]] = True
    if not latents:
        return found
    if connector is None:
        raise BadInputError(
            "the positions of its image belong to no place in the picture "
            f"({layout.why or f'layout {layout.kind!r}'}), so none of them are an object's; give connector=, what each "
            "takes from the patches, or work without masks",
            int(layout.image_sample[latents[0]]),
        )
    taken = latent_shares(model, connector, {image: (pictures[image], masks[image]) for image in latents})
    return found | (taken > share).to(found.device)


def _covered(
    model: Framed, picture: Image.Image, mask: Mask, grid: Tensor, overview: bool
) -> Float[Tensor, "rows cols"]:
    """How much of each patch of a grid a mask covers."""
    size = (grid.shape[0], grid.shape[1])
    return coverage(mask, frame(model, picture, size, overview), size)


def latent_shares(
    model: Framed, connector: Connector, objects: Mapping[int, tuple[Image.Image, Mask | None]]
) -> Float[Tensor, "b p"]:
    """How much of what each position takes comes from an object: its patches' weights times how far it covers them.

    Args:
        model: Whose patches.
        connector: What positions take from patches.
        objects: Number of an image -> picture and mask.

    Raises:
        BadInputError: If an image has no grid of patches in the tower, either.
    """
    layout = connector.batch.layout
    covered = torch.zeros(connector.size, dtype=torch.float64)
    for image, (picture, mask) in objects.items():
        own = layout.images[image]
        if own.patches is None:
            raise BadInputError(
                f"image {image} has no grid of patches in the tower: {layout.why or 'it is not known'}; work without "
                "masks"
            )
        for grid, overview in ((own.patches, False), (own.patches_overview, True)):
            if grid is not None and mask is not None:
                rows, places = grid[..., 0].cpu(), grid[..., 1].cpu()
                covered[rows, places] = _covered(model, picture, mask, grid, overview)
    parts = connector.weight.double().cpu() * covered[connector.row.cpu(), connector.patch.cpu()]
    found = torch.zeros(connector.batch.modality.shape, dtype=torch.float64)
    return found.index_put((connector.sample.cpu(), connector.position.cpu()), parts, accumulate=True)


def patch_positions(
    model: Framed,
    batch: Batch,
    pictures: Sequence[Image.Image],
    masks: Sequence[Mask | None],
    shape: Sequence[int],
    share: float = SHARE,
) -> Bool[Tensor, "rows places"]:
    """The places of a tower's value whose patches an object covers; arguments as in `object_positions`.

    Args:
        model: Whose patches.
        batch: What it is given.
        pictures: One per image.
        masks: The object's pixels in each, or None.
        shape: Of a value of the tower's blocks.
        share: As in `object_positions`.

    Returns:
        A mask over `batch.layout.sheet(value)`, for `Masked.of_patches`.
    """
    _checked(batch, pictures, masks)
    layout = batch.layout
    sheet = layout.sheet(torch.arange(int(np.prod(shape[:-1]))).reshape(tuple(shape[:-1]))[..., None].double())
    found = torch.zeros(sheet.shape[:2], dtype=torch.bool)
    for image, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        if mask is None:
            continue
        for overview in (False, True):
            if overview and layout.images[image].patches_overview is None:
                continue
            cells = layout.read(image, sheet, "patches", overview=overview)[..., 0]
            grid = (cells.shape[0], cells.shape[1])
            covered = (coverage(mask, frame(model, picture, grid, overview), grid) > share) & ~cells.isnan()
            found |= torch.isin(sheet[..., 0], cells[covered])
    return found


def subject_positions(batch: Batch, tokenizer: Any, words: Sequence[str | None]) -> Bool[Tensor, "b p"]:
    """Where each sample's question says a word or phrase, as a whole; nowhere for None.

    Raises:
        BadInputError: If there is not one per sample, or a question does not say it.
    """
    if len(words) != len(batch):
        raise BadInputError(f"{len(words)} subjects for {len(batch)} samples; give one per sample, or None")
    text = batch.decoder or batch
    found, ids, asked = torch.zeros_like(text.modality, dtype=torch.bool), token_ids(text), text.role == Role.QUESTION
    for sample, word in enumerate(words):
        if word is None:
            continue
        places = asked[sample].nonzero()[:, 0]
        matches = find_words(tokenizer, ids[sample, places].tolist(), [word]) if len(places) else []
        if not matches:
            raise BadInputError(f"the question does not say {word!r}, which was given as its subject", sample)
        for match in matches:
            found[sample, places[match.start : match.stop]] = True
    return found


def position_groups(
    batch: Batch,
    rows: Int[Tensor, " b"] | None = None,
    *,
    objects: Bool[Tensor, "b p"] | None = None,
    subjects: Bool[Tensor, "b p"] | None = None,
) -> Groups:
    """The groups of every sample, disjoint, by name in the order of the table above; none that no sample has.

    Args:
        batch: Prompts, or prompts with answers; of an encoder-decoder, the decoder's positions are meant.
        rows: The row per sample that predicts what is asked about; the prompt's last unless given.
        objects: From `object_positions`; without, all of the image is one group.
        subjects: From `subject_positions`.

    Raises:
        BadInputError: If roles are unknown, or `rows` are not one per sample.
    """
    text = batch.decoder or batch
    if bool((text.role == Role.UNKNOWN).any()):
        raise BadInputError("this batch was made from raw tensors, so roles are unknown; make it with model.prepare")
    rows = text.last_prompt() if rows is None else rows.to(text.modality.device)
    if rows.shape != (len(text),):
        raise BadInputError(f"rows of shape {tuple(rows.shape)} for {len(text)} samples; give one per sample")
    places = torch.arange(text.modality.shape[1], device=rows.device)
    last = places == rows[:, None]
    free = (text.modality != Modality.PAD) & (places < rows[:, None])
    made: Groups = {}
    image = text.modality == Modality.IMAGE
    none = torch.zeros_like(image)
    own = none if objects is None else objects.to(image.device)
    named = none if subjects is None else subjects.to(image.device)
    for name, chosen in (
        ("object", image & own),
        ("image" if objects is None else "other patches", image),
        ("subject", named),
        ("question", text.role == Role.QUESTION),
        ("answer", text.role == Role.ANSWER),
        ("template", ~image),
    ):
        made[name] = chosen & free
        free = free & ~chosen
    made["last"] = last
    order = ("object", "image", "other patches", "subject", "question", "template", "answer", "last")
    return {name: made[name] for name in order if name in made and bool(made[name].any())}
