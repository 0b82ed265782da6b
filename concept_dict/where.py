"""Where in a picture a concept is: its activation per patch, drawn over the picture.

Two ways to say where:

- `positions`: the concept's activation at every image position of a hook, laid out as the picture is. It tells where
  the stream holds the concept, at a layer where image positions do so. Not for models whose image positions are latent
  queries (Idefics2, BLIP-2) or that have none (Mllama).
- `gradient`: which patches the concept's activation at given positions (where the model decides on a word, say) depends
  on, to first order: m_p = |v_p . d(c_k . z) / d v_p|, with v_p the patch's vector as the text reads it (behind the
  projector, or before it where that has no grid). For every model whose tower has patches.

On the small models, for concepts of colours at the last layer and the masks of the objects that have them, either tells
a pixel inside from one outside with an AUROC above .9.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.cache import ActivationCache
from hooked_mm.drawing import overlay
from hooked_mm.errors import BadInputError
from hooked_mm.frames import Box, frame
from hooked_mm.hooked import HookedMM
from hooked_mm.layout import Where

Way = Literal["positions", "gradient", "none"]


class Concepts(Protocol):
    """What is needed of a fitted decomposition."""

    components_: Tensor
    mean_: Tensor

    def transform(self, X: Tensor) -> Tensor:
        """Activations (n, k) of rows (n, d)."""
        ...


@dataclass(frozen=True)
class WhereMap:
    """A concept's value per patch, and the part of the picture that the patches cover.

    Attributes:
        values: (rows, cols) float32; NaN where the model has no patch.
        box: (left, top, right, bottom) in pixels of the picture.
        size: (width, height) of the picture.
    """

    values: Float[np.ndarray, "rows cols"]
    box: Box
    size: tuple[int, int]

    def draw(self, image: Image.Image, peak: float | None = None, side: int = 128) -> Image.Image:
        """The map over its picture; `peak` is the value in full colour, the map's largest unless given."""
        return overlay(image, self.values, self.box, peak, side)

    def pixels(self) -> Float[np.ndarray, "height width"]:
        """The value at every pixel's centre; NaN where no patch covers it."""
        (width, height), (rows, cols) = self.size, self.values.shape
        left, top, right, bottom = self.box
        column = np.floor((np.arange(width) + 0.5 - left) / (right - left) * cols).astype(int)
        row = np.floor((np.arange(height) + 0.5 - top) / (bottom - top) * rows).astype(int)
        found = np.full((height, width), np.nan, np.float32)
        seen = np.ix_((row >= 0) & (row < rows), (column >= 0) & (column < cols))
        found[seen] = self.values[np.ix_(row[(row >= 0) & (row < rows)], column[(column >= 0) & (column < cols)])]
        return found


def patch_activations(
    concepts: Concepts, cache: ActivationCache, hook: str, sample: int
) -> list[Float[Tensor, "rows cols k"]]:
    """Activations of all concepts at the image positions of a hook, one grid per image of the sample.

    NaN where an image has no position. Float32 arithmetic whatever the cache holds.

    Raises:
        UnknownHookError: If the hook was not cached.
        BadInputError: If positions have no grid (the reason is given), or vectors another length than the concepts.
    """
    grids = cache.grid(hook, sample)
    found = []
    for grid in grids:
        rows = grid.flatten(0, 1).float()
        known = ~rows.isnan().any(dim=1)
        values = rows.new_full((len(rows), len(concepts.components_)), torch.nan)
        values[known] = concepts.transform(rows[known].cpu()).to(values)
        found.append(values.unflatten(0, grid.shape[:2]))
    return found


def has_grid(batch: Batch) -> bool:
    """Whether every image's positions have a place in the picture."""
    return bool(batch.layout.images) and all(image.grid is not None for image in batch.layout.images)


def best_way(batch: Batch, at_image: bool) -> Way:
    """How to say where: `positions` for what is read at image positions that have a place, else `gradient`.

    `none` where neither the tower nor the projector has patches with a place.
    """
    if at_image and has_grid(batch):
        return "positions"
    images = batch.layout.images
    placed = all(image.tokens is not None for image in images) or all(image.patches is not None for image in images)
    return "gradient" if images and placed else "none"


def patch_gradients(
    concepts: Concepts, model: HookedMM, batch: Batch, hook: str, at: Sequence[tuple[int, Sequence[int], int]]
) -> list[list[Float[Tensor, "rows cols"]]]:
    """Which patches a concept's activation at a position comes from, to first order.

    Args:
        concepts: Dictionary of the hook.
        model: The model.
        batch: Pictures and texts.
        hook: Where the concepts live, a (b, p, d) point of the language model.
        at: (sample, positions, concept) for each map asked for; over several positions the activation is that of their
            mean.

    Returns:
        Per entry of `at`, a grid per image of the sample: how much the activation depends on the patch, never negative.

    Raises:
        BadInputError: If the model has no patches with a place in the picture.
    """
    layout, layer = batch.layout, model.hook_points[hook].layer
    behind = all(image.tokens is not None for image in layout.images)
    where: Where = "tokens" if behind else "patches"
    points = ["projector.hook_out"] if behind else _with_patches(model)
    stop = None if layer is None else layer + 1
    found: dict[int, list[Tensor]] = {}
    with torch.enable_grad():
        _, cache = model.run_with_cache(batch, [*points, hook], stop_at_layer=stop, grad=True)
        # Where a resampler stands in front of the projector, only the tower still has patches.
        fitting = [name for name in points if behind or layout.fits_patches(cache[name])]
        value, target = cache[(fitting or points)[0]], cache[hook]
        directions = concepts.components_.to(target.device, torch.float32)
        for wave in _waves([sample for sample, _, _ in at]):
            # No patch has a part in another sample's activation, so one pass back serves a concept of each sample.
            scores = [target[at[n][0], list(at[n][1])].float().mean(0) @ directions[at[n][2]] for n in wave]
            (gradient,) = torch.autograd.grad(torch.stack(scores).sum(), value, retain_graph=True)
            share = (gradient.float() * value.detach().float()).sum(dim=-1, keepdim=True).abs()
            for n in wave:
                images = (layout.image_sample == at[n][0]).nonzero()[:, 0].tolist()
                found[n] = [layout.read(image, share, where, overview=False)[..., 0].cpu() for image in images]
    return [found[n] for n in range(len(at))]


def _with_patches(model: HookedMM) -> list[str]:
    """Points in front of the connector that may hold the tower's patches, the last first."""
    tower = [name for name in model.hook_names if re.fullmatch(r"vision\.blocks\.\d+\.hook_resid_post", name)]
    return [name for name in ("projector.hook_in", *tower[-1:]) if name in model.hook_names]


def _waves(samples: Sequence[int]) -> list[list[int]]:
    """Indices in groups in which no sample occurs twice."""
    waves: list[list[int]] = []
    seen: Counter[int] = Counter()
    for index, sample in enumerate(samples):
        if seen[sample] == len(waves):
            waves.append([])
        waves[seen[sample]].append(index)
        seen[sample] += 1
    return waves


def where_map(model: HookedMM, image: Image.Image, values: Tensor | np.ndarray) -> WhereMap:
    """A grid of values (rows, cols) with its place on the picture."""
    found = np.asarray(torch.as_tensor(values).float())
    if found.ndim != 2:
        raise BadInputError(f"a map is (rows, cols); got shape {found.shape}: choose one concept of it")
    return WhereMap(found, frame(model, image, (found.shape[0], found.shape[1])), image.size)
