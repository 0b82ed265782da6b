"""Which image tokens to replace: an object's region, those of largest norm, random ones; all of each sample's own.

| set | tokens |
|---|---|
| region | those whose patch an object's mask covers for a share at least; if none, those it covers most |
| region of latents | a resampler's: those that look at the object most, as many as its share of patches |
| complement | all others |
| largest norm | registers, which hold other things than their patch (Darcet et al. 2023, arXiv 2309.16588) |
| random | as many as another set has, drawn without repeats |
| random region | as many, those nearest to a random one of them on the patch grid |

A draw depends on its seed and on a number of the sample (its key), not on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from analyses.position_groups import coverage, latent_shares
from analyses.token_ablation import ImageTokens
from hooked_mm.batch import Batch
from hooked_mm.cache import ActivationCache
from hooked_mm.connector import connector_map
from hooked_mm.errors import BadInputError
from hooked_mm.frames import Box, frame
from hooked_mm.hooked import HookedMM

Masks = Sequence[Sequence[Bool[Tensor, "height width"]]]


def token_grids(
    model: HookedMM, batch: Batch, tokens: ImageTokens, sample: int, sizes: Sequence[tuple[int, int]]
) -> list[list[tuple[Float[Tensor, "rows cols"], Box]]]:
    """Where on its pictures the tokens of a sample lie: per picture the grid, and the overview's if there is one.

    Args:
        model: The model.
        batch: The batch.
        tokens: Its image tokens.
        sample: Which sample.
        sizes: (width, height) of each of its pictures.

    Returns:
        Grids of the tokens' numbers, NaN where none stands, and the part of the picture each covers, in pixels.

    Raises:
        BadInputError: If the model has no grid (a resampler's latents lie nowhere), or pictures are too few or many.
    """
    cache = ActivationCache({tokens.point: tokens.numbers()[..., None]}, batch, model.hook_points)
    own = (batch.image_sample == sample).nonzero()[:, 0].tolist()
    if len(own) != len(sizes):
        raise BadInputError(f"has {len(own)} pictures, but {len(sizes)} were given for it", sample)
    found: list[list[tuple[Tensor, Box]]] = [[] for _ in own]
    for small in (False, True):
        images = [batch.layout.images[image] for image in own]
        if small and all(image.overview is None and image.tokens_overview is None for image in images):
            continue
        for place, grid in enumerate(cache.grid(tokens.point, sample, overview=small)):
            numbers = grid[..., 0]
            picture = Image.new("1", sizes[place])
            found[place].append((numbers, frame(model, picture, (numbers.shape[0], numbers.shape[1]), overview=small)))
    return found


def region_tokens(
    model: HookedMM, batch: Batch, tokens: ImageTokens, masks: Masks, share: float = 0.5
) -> Bool[Tensor, "b n"]:
    """The tokens of a region of each sample's pictures, in crops and overview alike.

    Args:
        model: The model.
        batch: The batch.
        tokens: Its image tokens.
        masks: Per sample a mask per picture, in the picture's own pixels.
        share: Of a patch's pixels that must lie in the mask, above 0. In a grid where no patch reaches it, those that
            the mask covers most are taken; a mask without pixels has no tokens. Latents are chosen without it.

    Raises:
        BadInputError: As `token_grids`, or if `share` is out of range or masks are not one list per sample.
    """
    if len(masks) != len(batch) or not 0 < share <= 1:
        raise BadInputError(
            f"masks of {len(masks)} samples for {len(batch)}, share={share}; one list each, above 0 to 1"
        )
    if batch.layout.kind == "resampled":
        return _looking_at(model, batch, tokens, masks)
    chosen = torch.zeros(tokens.real.shape, dtype=torch.bool)
    for sample, own in enumerate(masks):
        sizes = [(mask.shape[1], mask.shape[0]) for mask in own]
        for mask, grids in zip(own, token_grids(model, batch, tokens, sample, sizes), strict=True):
            for numbers, box in grids:
                covered = coverage(mask, box, (numbers.shape[0], numbers.shape[1])).masked_fill(numbers.isnan(), 0)
                most = float(covered.max())
                if most > 0:
                    chosen[sample, numbers[covered >= min(share, most)].long()] = True
    return chosen


def _looking_at(model: HookedMM, batch: Batch, tokens: ImageTokens, masks: Masks) -> Bool[Tensor, "b n"]:
    """The latents that take most from a region, by the connector's attention: as many as its share of the picture."""
    owner, flat = batch.image_sample.tolist(), [mask for own in masks for mask in own]
    wrong = next((sample for sample, own in enumerate(masks) if len(own) != owner.count(sample)), None)
    if wrong is not None:
        raise BadInputError(
            f"has {owner.count(wrong)} pictures, but {len(masks[wrong])} masks were given for it", wrong
        )
    objects = {image: (Image.new("1", (mask.shape[1], mask.shape[0])), mask) for image, mask in enumerate(flat)}
    taken = tokens.gather(latent_shares(model, connector_map(model, batch), objects)).cpu()
    number, chosen = tokens.image.cpu(), torch.zeros(tokens.real.shape, dtype=torch.bool)
    for image, (sample, mask) in enumerate(zip(owner, flat, strict=True)):
        place = (number[sample] == image - owner.index(sample)).nonzero()[:, 0]
        if bool(mask.any()):
            best = taken[sample, place].argsort(descending=True, stable=True)
            chosen[sample, place[best[: max(1, round(float(mask.double().mean()) * len(place)))]]] = True
    return chosen


def largest_norm(values: Float[Tensor, "b n d"], real: Bool[Tensor, "b n"], count: Int[Tensor, " b"]) -> Tensor:
    """The tokens of largest Euclidean norm, (b, n) bool.

    Args:
        values: What tokens hold, at the point where they are replaced or in the tower.
        real: Which are tokens of the sample.
        count: How many of each sample.

    Raises:
        BadInputError: If a sample has fewer.
    """
    norms = values.double().norm(dim=-1).cpu().masked_fill(~real.cpu(), -torch.inf)
    return first_of(norms.argsort(dim=1, descending=True, stable=True), real, count)


def first_of(order: Int[Tensor, "b n"], real: Bool[Tensor, "b n"], count: Int[Tensor, " b"]) -> Bool[Tensor, "b n"]:
    """The first `count` tokens of each sample in an order of token numbers.

    Raises:
        BadInputError: If a sample has fewer.
    """
    own = real.sum(1).cpu()
    if bool((count.cpu() > own).any()) or bool((count < 0).any()):
        sample = int(((count.cpu() > own) | (count.cpu() < 0)).nonzero()[0])
        raise BadInputError(f"{int(count[sample])} tokens were asked for, but it has {int(own[sample])}", sample)
    taken = torch.arange(order.shape[1]) < count.cpu()[:, None]
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order.cpu(), taken)


def random_orders(real: Bool[Tensor, "b n"], draws: int, seed: int = 0, keys: Sequence[int] | None = None) -> Tensor:
    """Random orders of each sample's own tokens, (draws, b, n) token numbers; what is no token comes last.

    Args:
        real: Which are tokens of the sample; they come first.
        draws: How many orders.
        seed: Of the draws.
        keys: A number per sample; 0 for all unless given.
    """
    width, counts = real.shape[1], real.sum(1).tolist()
    found = torch.arange(width).repeat(draws, len(counts), 1)
    for row, (count, key) in enumerate(zip(counts, keys or [0] * len(counts), strict=True)):
        for draw in range(draws):
            order = np.random.default_rng([seed, int(key), draw]).permutation(count)
            found[draw, row, :count] = torch.from_numpy(order)
    return found


def random_tokens(
    real: Bool[Tensor, "b n"], count: Int[Tensor, " b"], draws: int, seed: int = 0, keys: Sequence[int] | None = None
) -> Bool[Tensor, "draws b n"]:
    """As many random tokens of each sample, per draw.

    Args:
        real: Which are tokens of the sample.
        count: How many of each.
        draws: How many draws.
        seed: Of the draws.
        keys: A number per sample; 0 for all unless given.

    Raises:
        BadInputError: If a sample has fewer.
    """
    return torch.stack([first_of(order, real, count) for order in random_orders(real, draws, seed, keys)])


def random_regions(
    model: HookedMM,
    batch: Batch,
    tokens: ImageTokens,
    count: Int[Tensor, " b"],
    sizes: Sequence[Sequence[tuple[int, int]]],
    draws: int,
    seed: int = 0,
    keys: Sequence[int] | None = None,
) -> Bool[Tensor, "draws b n"]:
    """As many tokens of each sample as another set has, side by side: those nearest to a random token's place.

    Args:
        model: The model.
        batch: The batch.
        tokens: Its image tokens.
        count: How many of each sample.
        sizes: Per sample the (width, height) of each picture.
        draws: How many draws.
        seed: Of the draws.
        keys: A number per sample; 0 for all unless given.

    Raises:
        BadInputError: As `token_grids`, or if a sample has fewer tokens on its grids.
    """
    found = []
    drawn = random_orders(tokens.real.cpu(), draws, seed, keys)
    places = [_places(model, batch, tokens, sample, own) for sample, own in enumerate(sizes)]
    for draw in range(draws):
        orders = []
        for sample, place in enumerate(places):
            known = ~place[:, 0].isnan()
            if int(count[sample]) > int(known.sum()):
                raise BadInputError(
                    f"{int(count[sample])} tokens were asked for, but only {int(known.sum())} have a place", sample
                )
            order = drawn[draw, sample]
            centre = place[order[known[order]][:1]]
            distance = (place - centre).square().sum(1).nan_to_num(nan=torch.inf)
            orders.append(distance.argsort(stable=True))
        found.append(first_of(torch.stack(orders), tokens.real, count))
    return torch.stack(found)


def _places(
    model: HookedMM, batch: Batch, tokens: ImageTokens, sample: int, sizes: Sequence[tuple[int, int]]
) -> Float[Tensor, "n 3"]:
    """Picture, x and y of each token's centre, as shares of the picture; pictures lie far from each other."""
    where = torch.full((tokens.real.shape[1], 3), torch.nan, dtype=torch.float64)
    for picture, grids in enumerate(token_grids(model, batch, tokens, sample, sizes)):
        for numbers, (left, top, right, bottom) in grids:
            rows, cols = numbers.shape
            side = max(sizes[picture])
            down = (top + (torch.arange(rows).double() + 0.5) / rows * (bottom - top)) / side
            across = (left + (torch.arange(cols).double() + 0.5) / cols * (right - left)) / side
            stands = ~numbers.isnan()
            own = numbers[stands].long()
            where[own, 0] = 1000.0 * picture
            where[own, 1] = across.expand(rows, cols)[stands]
            where[own, 2] = down[:, None].expand(rows, cols)[stands]
    return where
