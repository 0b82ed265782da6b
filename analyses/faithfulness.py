"""How faithful attribution maps are: against the object that is asked for, and against the model's own answer.

Where in a picture the asked object is, is known for scenes; a map over pixels is held against its mask (`patch_maps`):

    pixel AUROC     its pixels against all others
    among objects   its pixels against those of the other objects: a map of whatever is an object has .5
    IoU             of as many pixels of largest value as the object has

No map made of patches can trace an outline; `coarsened` is the object itself seen through a patch grid: each patch has
the share of it that the object covers, which no order of patches beats. What the model itself relies on is tested on
its answer (Petsiuk et al. 2018, arXiv 1806.07421), with p the probability of the target token:

    deletion        area under p while pixels of largest value are covered first, from none to all: low is faithful
    insertion       area under p while they are uncovered first in an empty picture: high is faithful
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from PIL import Image
from torch import Tensor

from analyses.occlusion import Scores, cover, in_parts
from analyses.patch_maps import auroc, iou, on_picture
from hooked_mm.errors import BadInputError
from hooked_mm.frames import Box


@dataclass(frozen=True)
class Located:
    """How well a map finds an object; NaN where there is nothing to tell apart."""

    auroc: float
    among: float
    iou: float


def located(
    pixels: Float[Tensor, "height width"],
    mask: Bool[Tensor, "height width"],
    others: Bool[Tensor, "height width"] | None = None,
) -> Located:
    """How well a map over pixels finds an object.

    Args:
        pixels: The map; NaN, where no patch reaches, is below every value.
        mask: The object's pixels.
        others: Those of the other objects; None if there are none.

    Raises:
        BadInputError: If shapes differ.
    """
    if pixels.shape != mask.shape or (others is not None and others.shape != mask.shape):
        raise BadInputError(f"a map of {tuple(pixels.shape)} pixels for masks of {tuple(mask.shape)}")
    among = float("nan")
    if others is not None:
        either = mask | others
        among = auroc(pixels[either], mask[either])
    # Of pixels that tie, none is to be preferred because of where it stands.
    values = pixels.double().nan_to_num(nan=-torch.inf).flatten()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[order[values[order].argsort(descending=True, stable=True)[: int(mask.sum())]]] = True
    return Located(auroc(pixels.flatten(), mask.flatten()), among, iou(chosen.reshape(mask.shape), mask))


def coarsened(
    mask: Bool[Tensor, "height width"], grid: tuple[int, int], box: Box, *, smooth: bool = True
) -> Float64[Tensor, "height width"]:
    """The object through a grid of patches: each patch has the share of its pixels that are the object's.

    Args:
        mask: The object's pixels.
        grid: (rows, cols).
        box: The part of the picture that the grid covers, in pixels.
        smooth: Drawn between the centres of patches, as maps are.
    """
    (height, width), (rows, cols) = mask.shape, grid
    left, top, right, bottom = box
    down = ((torch.arange(height).double() + 0.5 - top) / (bottom - top) * rows).floor().long()
    across = ((torch.arange(width).double() + 0.5 - left) / (right - left) * cols).floor().long()
    inside = ((down >= 0) & (down < rows))[:, None] & ((across >= 0) & (across < cols))
    cell = (down[:, None] * cols + across)[inside]
    count = torch.bincount(cell, minlength=rows * cols).double()
    share = torch.bincount(cell, mask[inside].double(), minlength=rows * cols) / count.clamp_min(1)
    return on_picture(share.reshape(rows, cols), box, (width, height), smooth=smooth)


def from_centre(size: tuple[int, int]) -> Float64[Tensor, "height width"]:
    """The control that knows no picture: the nearer to the middle, the larger."""
    width, height = size
    across, down = ((torch.arange(n).double() + 0.5) / n - 0.5 for n in (width, height))
    return -(down[:, None] ** 2 + across**2)


def removed(
    image: Image.Image,
    pixels: Float[Tensor, "height width"],
    shares: Sequence[float],
    *,
    insert: bool = False,
    colour: tuple[int, int, int] | None = None,
) -> list[Image.Image]:
    """The picture with the given shares of its pixels covered, those of largest value first.

    Args:
        image: The picture.
        pixels: The map; NaN is below every value, ties fall by chance (always the same).
        shares: 0 to 1 each.
        insert: The other way round: only these pixels are uncovered.
        colour: Of the cover; the picture's mean unless given.

    Raises:
        BadInputError: If the map is not of this picture.
    """
    whole = np.array(image.convert("RGB"))
    if tuple(pixels.shape) != whole.shape[:2]:
        raise BadInputError(f"a map of {tuple(pixels.shape)} pixels for a picture of {whole.shape[:2]}")
    fill = cover(whole, colour)
    values = pixels.double().nan_to_num(nan=-torch.inf).flatten().numpy()
    shuffled = np.random.default_rng(0).permutation(len(values))
    order = shuffled[np.argsort(-values[shuffled], kind="stable")]
    made = []
    for share in shares:
        first = np.zeros(len(values), bool)
        first[order[: round(share * len(values))]] = True
        made.append(Image.fromarray(np.where((first ^ insert).reshape(whole.shape[:2])[..., None], fill, whole)))
    return made


def area(shares: Sequence[float], values: Float[Tensor, " n"]) -> float:
    """The area under a curve by the trapezoidal rule, divided by its width."""
    return float(torch.trapezoid(values.double(), torch.tensor(shares, dtype=torch.float64)) / (shares[-1] - shares[0]))


def deletion_and_insertion(
    probability: Scores,
    image: Image.Image,
    pixels: Float[Tensor, "height width"],
    *,
    steps: int = 10,
    batch_size: int = 32,
) -> tuple[float, float]:
    """The areas under the target's probability while pixels are covered, and uncovered, in the map's order.

    Args:
        probability: Of the target token, for some pictures and the same question.
        image: The picture.
        pixels: The map.
        steps: Equal shares of pixels.
        batch_size: Pictures at a time.
    """
    shares = [step / steps for step in range(steps + 1)]
    found = []
    for insert in (False, True):
        shown = iter(removed(image, pixels, shares, insert=insert))
        values = torch.cat([probability(part).detach().cpu() for part in in_parts(shown, batch_size)])
        found.append(area(shares, values))
    return found[0], found[1]
