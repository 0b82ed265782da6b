"""A picture asked about many times is encoded once: its features are written where a text has its image positions.

Tower and connector run on distinct pictures alone; the batch then runs without pictures, and `hook_embed` is given the
features. That is the same wherever features enter the decoder there and nowhere else, and depend on the picture alone.
Where it is not (features that also enter between layers, or by cross-attention, or that depend on the question),
`proven` says so, on a real batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.layout_source import pictures
from hooked_mm.runner import HookSpec

POINT = "hook_embed"
Features = Sequence[Float[Tensor, "tokens d"]]


def encode(model: HookedMM, shown: Batch) -> list[Float[Tensor, "tokens d"]]:
    """The features of every image of a batch, as the decoder gets them; no layer of the decoder runs."""
    _, cache = model.run_with_cache(shown, POINT, stop_at_layer=0)
    index = shown.image_index
    return [cache[POINT][index == image] for image in range(len(shown.image_sample))]


def without_pictures(batch: Batch) -> Batch:
    """The same positions, for which no tower will run."""
    gone = set(pictures(batch.inputs))
    return batch.with_inputs({name: value for name, value in batch.inputs.items() if name not in gone})


def write_features(batch: Batch, features: Features, picture_of: Sequence[int]) -> HookSpec:
    """A hook that puts features at image positions.

    Args:
        batch: Whose images they are; more text may stand behind it.
        features: Of the distinct pictures.
        picture_of: Per image of the batch, which of them it is.
    """
    where = batch.image_index >= 0
    rows = torch.cat([features[picture] for picture in picture_of])

    def write(value: Float[Tensor, "b p d"], hook: object) -> Float[Tensor, "b p d"] | None:
        # Further steps of a generation see one new position each, which is text.
        if value.shape[1] < where.shape[1]:
            return None
        out = value.clone()
        out[:, : where.shape[1]][where.to(value.device)] = rows.to(value)
        return out

    return POINT, write


def proven(model: HookedMM, batch: Batch, shown: Batch, picture_of: Sequence[int], hooks: Sequence[str]) -> bool:
    """Whether values at these hooks are the same with features written as with the pictures themselves.

    Up to rounding: 1e-4 of the largest value in float32, 3 % in half precision, where other shapes of a batch already
    make such differences.
    """
    points = model.hook_points
    if POINT not in points:
        return False
    _, direct = model.run_with_cache(batch, list(hooks), logits_to_keep=1)
    features = encode(model, shown)
    with model.hooks([write_features(batch, features, picture_of)]):
        try:
            _, written = model.run_with_cache(without_pictures(batch), list(hooks), logits_to_keep=1)
        except BadInputError:
            # A layer of cross-attention, which a batch without pictures does not reach.
            return False
    allowed = 1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2
    real = batch.inputs["attention_mask"].bool()
    for name in hooks:
        one, other = (cache[name].float()[real.to(cache[name].device)] for cache in (direct, written))
        if bool((one - other).abs().max() > allowed * one.abs().max()):
            return False
    return True
