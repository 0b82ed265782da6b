"""Maps over a picture's patches, laid over its pixels and held against an object's mask.

A map is a grid of values (rows, cols), one per patch, NaN where the model has none; its box says which part of the
picture the grid covers (`hooked_mm.frames`). With P the pixels chosen, M those of the object:

    IoU      |P n M| / |P u M|
    pointing whether the largest value lies on the object (Zhang et al. 2018, arXiv 1608.00507)
    AUROC    the share of pairs (pixel of the object, other pixel) in which the object's has the larger value, ties half
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.frames import Box


def on_picture(
    values: Float[Tensor, "rows cols"], box: Box, size: tuple[int, int], *, smooth: bool = True
) -> Float[Tensor, "height width"]:
    """A map's value at the centre of every pixel.

    Args:
        values: A value per patch, standing for the patch's centre; NaN where there is none.
        box: The part of the picture the grid covers, in pixels.
        size: (width, height) of the picture.
        smooth: Bilinear between the centres of patches, constant beyond the outermost; otherwise each pixel has the
            value of the patch it lies in. Between a value and a NaN there is nothing to interpolate: such pixels have
            their own patch's.

    Returns:
        float64; NaN where no patch covers the pixel.

    Raises:
        BadInputError: If the map is not (rows, cols), or the box has no extent.
    """
    left, top, right, bottom = box
    if values.ndim != 2 or not values.numel() or right <= left or bottom <= top:
        raise BadInputError(
            f"a map of shape {tuple(values.shape)} over the box {box}; give (rows, cols) and a box with extent"
        )
    wide, (width, height) = values.detach().double().cpu(), size
    # Coordinates in patches: patch n reaches from n to n + 1.
    across = (torch.arange(width).double() + 0.5 - left) / (right - left) * wide.shape[1]
    down = (torch.arange(height).double() + 0.5 - top) / (bottom - top) * wide.shape[0]
    inside = ((down >= 0) & (down < wide.shape[0]))[:, None] & ((across >= 0) & (across < wide.shape[1]))
    own = wide[_cell(down, wide.shape[0])][:, _cell(across, wide.shape[1])]
    found = own
    if smooth:
        rows, cols = _weights(down, wide.shape[0]), _weights(across, wide.shape[1])
        between = rows @ wide.nan_to_num() @ cols.T
        # Where a NaN has a share, the weights of what is known do not add up to one.
        known = rows @ (~wide.isnan()).double() @ cols.T
        found = torch.where(known > 1 - 1e-9, between, own)
    return torch.where(inside, found, torch.nan)


def _cell(place: Tensor, count: int) -> Tensor:
    return place.floor().long().clamp(0, count - 1)


def _weights(place: Tensor, count: int) -> Float[Tensor, "pixels count"]:
    """Each pixel's shares of the two patches between whose centres it lies."""
    position = (place - 0.5).clamp(0, count - 1)
    low = position.floor().long().clamp(max=max(count - 2, 0))
    share = position - low
    weights = torch.zeros(len(place), count, dtype=torch.float64)
    weights.scatter_add_(1, low[:, None], (1 - share)[:, None])
    weights.scatter_add_(1, (low + 1).clamp(max=count - 1)[:, None], share[:, None])
    return weights


def covers(mask: Float[np.ndarray, "height width"]) -> Bool[Tensor, "height width"]:
    """The pixels that an object covers for more than half."""
    return torch.from_numpy(np.asarray(mask) > 0.5)


def iou(chosen: Bool[Tensor, "height width"], mask: Bool[Tensor, "height width"]) -> float:
    """|P n M| / |P u M|; NaN if neither has a pixel."""
    union = int((chosen | mask).sum())
    return int((chosen & mask).sum()) / union if union else float("nan")


def pointing(values: Float[Tensor, "height width"], mask: Bool[Tensor, "height width"]) -> float:
    """The share of the pixels of largest value (several if they tie) that lie on the object; NaN if all are NaN."""
    known = values.nan_to_num(nan=-torch.inf)
    peak = known == known.max()
    return float("nan") if bool(values.isnan().all()) else float(mask[peak].double().mean())


def auroc(scores: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """Area under the ROC curve by ranks (Mann and Whitney 1947), ties half; NaN is below every value.

    NaN if all are of one kind.
    """
    scores, truth = scores.flatten(), truth.flatten()
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return float("nan")
    ranks = torch.from_numpy(rankdata(scores.double().nan_to_num(nan=-torch.inf).numpy()))
    return (float(ranks[truth].sum()) - positive * (positive + 1) / 2) / (positive * negative)
