"""Relevancy from a token to the tower's patches, through language model, connector and tower.

Chefer et al. 2021 (arXiv 2103.15679). Of a token predicted at row t, with img the image tokens:

    R_llm[t, img] C R^_vit

R_llm: `relevancy`. C (tokens, patches) says of which patches a token is made (`hooked_mm.connector`): of one, of the
k x k that are merged, or, where the connector attends, by Chefer's rule on its own attention weighted by its gradients.
The tower's R^_vit is that of its layers, from the first to the last whose output is used, and stands on the right: a
row goes in, so it is carried from the last layer to the first. Layers that the target does not depend on (those behind
the one that features are taken from) are the identity. What class tokens gather goes on through the tower, and what
reaches class tokens at its entrance belongs to no place. Where features of several layers are taken, all are carried
through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from analyses.pattern_gradients import PatternGradients, Round, Tell
from analyses.picture_maps import PictureMap, tower_maps
from analyses.relevancy import Relevancies, combined, of_text, shares, stack_points, text_points, through
from analyses.targets import Kind, Targets
from hooked_mm.batch import Batch
from hooked_mm.connector import Connector, connector_map, connector_patterns
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.layout import Layout

Start = Literal["relevancy", "even"]


@dataclass(frozen=True)
class TowerRelevancies:
    """What every target's prediction rests on, down to the tower's patches.

    Attributes:
        text: The relevancy of the language model's positions.
        sheets: (rounds, rows, patches), of every row of the tower its patches, without class tokens. A round holds one
            target of each sample, on that sample's own rows (in a packed tower, places).
        round_of: (n,), the round of each target.
    """

    text: Relevancies
    sheets: Float[Tensor, "rounds rows patches"]
    round_of: Int[Tensor, " n"]

    def maps(self, model: HookedMM, batch: Batch, number: int, images: Sequence[Image.Image]) -> list[PictureMap]:
        """A target over its sample's pictures: a map per grid, the overview's behind that of the crops.

        Args:
            model: The model.
            batch: That was explained.
            number: Of the target.
            images: The sample's pictures, as they were given to `prepare`.

        Raises:
            BadInputError: If there are not as many pictures as the sample has.
        """
        sample = int(self.text.targets.sample[number])
        return tower_maps(model, batch, sample, self.sheets[int(self.round_of[number])], images)


def tower_places(layout: Layout, width: int) -> Int[Tensor, " width"]:
    """Which patch lies at each place of the tower's rows; -1 for a class token, -2 for padding.

    Raises:
        BadInputError: If rows of this width do not hold the batch's patches.
    """
    if layout.kind == "packed":
        size = 0 if layout.tower_image is None else len(layout.tower_image)
        found = torch.arange(width) if width == size else None
    else:
        found = layout.places(width, layout.patches)
    if found is None:
        raise BadInputError(
            f"rows of {width} places in the tower do not hold this batch's patches ({layout.why or layout.patches}), "
            "as where windows or merged patches attend; explain the language model's positions alone "
            "(relevancy.relevancies)"
        )
    return found


def spread(
    sheet: Float[Tensor, "rows from"],
    here: Int[Tensor, " from"],
    there: Int[Tensor, " to"],
) -> Float[Tensor, "rows to"]:
    """Values at places as values at other places of the same patches; class tokens likewise, if both have them.

    Args:
        sheet: Values.
        here: The patch at each of their places; -1 for class tokens, -2 for padding.
        there: The same of the places wanted.
    """
    found = sheet.new_zeros(len(sheet), len(there))
    for kind in (here >= 0, here == -1):
        one = kind.nonzero()[:, 0]
        other = ((there >= 0) if bool((here[one] >= 0).all()) else (there == -1)).nonzero()[:, 0]
        if len(one) == len(other):
            order = one[here[one].argsort(stable=True)], other[there[other].argsort(stable=True)]
            found[:, order[1].to(sheet.device)] = sheet[:, order[0].to(sheet.device)]
    return found


def tower_points(found: PatternGradients, batch: Batch) -> tuple[list[str], Int[Tensor, " width"]]:
    """The tower's patterns among those of a run, and which patch lies at each place of their rows.

    Raises:
        BadInputError: If a layer attends within windows, or its places are not those of the batch's patches.
    """
    if batch.layout.tower_image is None:
        raise BadInputError(
            f"which patches of the tower belong to which picture is not known: {batch.layout.why}; explain the "
            "language model's positions alone (relevancy.relevancies)"
        )
    names = [name for name in found.patterns if name.startswith("vision.")]
    shapes = [(value.shape[0], *value.shape[2:]) for value in (found.patterns[name] for name in names)]
    rows = 1 if batch.layout.kind == "packed" else len(batch.layout.tower_image)
    for name, (count, queries, keys) in zip(names, shapes, strict=True):
        if count != rows or queries != keys or keys != shapes[-1][-1]:
            raise BadInputError(
                f"{name!r} attends within {count} groups of {keys} places, where the tower has {rows} rows of "
                f"{shapes[-1][-1]}: no rule carries relevancy through windows or merged patches; explain the language "
                "model's positions alone (relevancy.relevancies)"
            )
    return names, tower_places(batch.layout, shapes[-1][-1])


def on_tower(
    model: HookedMM, batch: Batch, text: Relevancies, one: Round, places: Int[Tensor, " width"]
) -> Float[Tensor, "rows width"]:
    """R_llm[t, img] C of a round's targets, at the places of the tower's rows."""
    layout, sample = batch.layout, text.targets.sample
    values = text.positions if text.keys is None else text.keys
    whole = values.new_zeros(len(batch), values.shape[1])
    whole[sample.to(values.device)] = values
    if text.keys is not None and not connector_patterns(model):
        # Keys are the tower's own places, row by row.
        rows = 0 if layout.tower_image is None else len(layout.tower_image)
        sheet = whole.reshape(rows, -1)
        return spread(sheet, tower_places(layout, sheet.shape[1]), places)
    sheet = connected(model, batch, one).on_patches(whole)
    return spread(sheet, torch.arange(sheet.shape[1]), places)


def connected(model: HookedMM, batch: Batch, one: Round) -> Connector:
    """C of a round, by Chefer's rule where the connector attends."""
    weighted = {}
    for name in connector_patterns(model):
        value = one.weighted[name]
        if value is None:
            raise BadInputError(f"no target depends on {name!r}, though its tokens do; this connector has no rule")
        # The map takes means over heads, of which one is left.
        weighted[name] = value[:, None]
    return connector_map(model, batch, weighted)


def evenly(batch: Batch, text: Relevancies) -> Relevancies:
    """The same with all image tokens of a sample (or all keys that are read) counting alike; they add up to one."""
    if text.keys is not None:
        return replace(text, keys=torch.full_like(text.keys, 1 / text.keys.shape[1]))
    mask = batch.mask("image").to(text.positions.device)[text.targets.sample.to(text.positions.device)]
    return replace(text, positions=shares(mask.to(text.positions)))


def end_to_end(
    model: HookedMM,
    batch: Batch,
    targets: Targets,
    *,
    kind: Kind = "logit",
    normalise: bool = True,
    start: Start = "relevancy",
    tell: Tell | None = None,
) -> TowerRelevancies:
    """The relevancy of the tower's patches to each target, in one forward pass and one backward pass per round.

    A packed tower has one pattern over the patches of all pictures, which grows with the square of their number: its
    samples are run one by one.

    Args:
        model: The model.
        batch: With images, and answers that hold the targets.
        targets: The tokens to explain, from `targets.answer_targets`.
        kind: The token's logit or log-probability.
        normalise: R^ with rows of R - I divided by their sums; False takes R itself.
        start: What the image tokens bring into connector and tower: their relevancy, or all of them as much (`even`),
            which leaves what the tower alone does: which patches go into the tokens, as far as the target gains by it.
        tell: Called in front of every backward pass.

    Raises:
        BadInputError: If a layer has no pattern, the tower's rows are not the batch's patches, or it is not known which
            tokens are made of which patches; it says which.
    """
    if not batch.has_images or "vision" not in model.structure.stacks:
        raise BadInputError(
            f"{'the batch has no images' if not batch.has_images else 'this model has no tower'}, so relevancy ends at "
            "the language model's positions (relevancy.relevancies)"
        )
    if batch.layout.kind == "packed" and len(batch) > 1:
        return _one_by_one(model, batch, targets, kind, normalise, start)
    tower = stack_points(model, "vision", batch)
    points = [*tower, *connector_patterns(model), *text_points(model, batch)]
    found = PatternGradients(model, batch, targets, points, kind)
    names, places = tower_points(found, batch)
    size = int((places >= 0).sum())
    parts, order = [], []
    sheets, round_of = [], torch.zeros(len(targets), dtype=torch.long)
    for number, one in enumerate(found.rounds(tell)):
        text = of_text(found, one, normalise=normalise)
        row = on_tower(model, batch, evenly(batch, text) if start == "even" else text, one, places)
        values = through(row, [one.weighted[name] for name in names], normalise=normalise)
        sheets.append(spread(values, places, torch.arange(size)).cpu())
        round_of[one.places] = number
        parts.append(text)
        order.append(one.places)
    return TowerRelevancies(combined(targets, parts, torch.cat(order)), torch.stack(sheets), round_of)


def _one_by_one(
    model: HookedMM, batch: Batch, targets: Targets, kind: Kind, normalise: bool, start: Start
) -> TowerRelevancies:
    """Each sample of a packed tower by itself, put together as if they had run together."""
    layout, parts, order = batch.layout, [], []
    assert layout.tower_image is not None
    most = int(torch.bincount(targets.sample).max())
    sheets, round_of = torch.zeros(most, 1, len(layout.tower_image)), torch.zeros(len(targets), dtype=torch.long)
    for sample in sorted(set(targets.sample.tolist())):
        numbers = (targets.sample == sample).nonzero()[:, 0]
        own = replace(targets.take(numbers), sample=torch.zeros_like(numbers))
        found = end_to_end(model, batch.take([sample]), own, kind=kind, normalise=normalise, start=start)
        places = (layout.image_sample[layout.tower_image] == sample).nonzero()[:, 0].cpu()
        sheets = sheets.to(found.sheets)
        sheets[: len(found.sheets), :, places] = found.sheets
        round_of[numbers] = found.round_of
        parts.append(found.text)
        order.append(numbers)
    return TowerRelevancies(combined(targets, parts, torch.cat(order)), sheets, round_of)
