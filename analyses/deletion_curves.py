"""Deletion and insertion: how a prediction falls as tokens go in the order of an attribution, and rises as they come.

Petsiuk et al. 2018 (arXiv 1806.07421), on image tokens instead of pixels. A sample has n tokens, taken in k steps from
the largest attribution down; after step i, c_i = round(i n / k) of them are

    deletion   replaced, all others stay
    insertion  as they are, all others are replaced

and y_i is the target's probability. With x_i = c_i / n,

    AUC        sum over i of (x_i - x_{i-1}) (y_i + y_{i-1}) / 2
    normalised (AUC - y_blank) / (y_whole - y_blank)

where y_whole is y with all tokens and y_blank without any: 0 is a picture that is gone, 1 one that is whole, whatever
the text alone is worth. A good attribution has a low deletion and a high insertion AUC; random orders lie between.
Tokens that an attribution does not tell apart go in random order: their order in the sequence is no merit of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from analyses.targets import Targets
from analyses.token_ablation import Fill, ImageTokens, ScoreKind, ablated_scores
from analyses.token_sets import random_orders
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM

LEAST = 0.01
"""The least that a prediction must lose without the picture for its curves to be normalised."""


@dataclass(frozen=True)
class Curves:
    """Scores of targets as tokens go or come, for several orders.

    Attributes:
        shares: (steps + 1, n), x: the share of the tokens that are gone (deletion) or there (insertion).
        deletion, insertion: (orders, steps + 1, n), y.
    """

    shares: Float64[Tensor, "s n"]
    deletion: Float64[Tensor, "m s n"]
    insertion: Float64[Tensor, "m s n"]

    def auc(self, which: str) -> Float64[Tensor, "m n"]:
        """Area under the curves of `deletion` or `insertion`."""
        return auc(self.shares, getattr(self, which))

    def normalised(self, which: str, least: float = LEAST) -> Float64[Tensor, "m n"]:
        """The same between a picture that is gone and one that is whole; NaN where the one is not `least` below."""
        whole, blank = self.deletion[:, 0], self.deletion[:, -1]
        lost = (whole - blank).masked_fill(whole - blank < least, torch.nan)
        return (self.auc(which) - blank) / lost


def auc(shares: Float[Tensor, "s n"], scores: Float[Tensor, "*m s n"]) -> Float64[Tensor, "*m n"]:
    """Area under curves by trapezia, in float64."""
    wide = scores.double()
    between = (wide[..., 1:, :] + wide[..., :-1, :]) / 2
    return (between * shares.double().diff(dim=0)).sum(-2)


def orders_of(
    maps: Float[Tensor, "m n t"], real: Bool[Tensor, "n t"], seed: int = 0, keys: Sequence[int] | None = None
) -> Int[Tensor, "m n t"]:
    """The orders in which tokens go: by falling attribution, ties at random; what is no token of the sample comes last.

    Args:
        maps: Attributions of each target's tokens.
        real: Which are tokens.
        seed: Of the order of ties, which is the same for all maps.
        keys: A number per target, as in `random_orders`.

    Raises:
        BadInputError: If shapes differ, or a token has no attribution.
    """
    if maps.ndim != 3 or maps.shape[1:] != real.shape:
        raise BadInputError(f"maps are {tuple(maps.shape)}; they must be (maps, {', '.join(map(str, real.shape))})")
    wide, there = maps.detach().double().cpu(), real.cpu()
    if bool((wide.isnan() & there).any()):
        target = int((wide.isnan() & there).any(2).any(0).nonzero()[0])
        raise BadInputError("a token has no attribution (NaN), so it has no place in the order", target)
    drawn = random_orders(there, 1, seed, keys).expand(len(wide), -1, -1)
    values = wide.masked_fill(~there, -torch.inf).gather(2, drawn)
    # A real token may have -inf itself; what is no token still comes behind it.
    values = torch.where(
        there.expand_as(wide).gather(2, drawn), values.clamp_min(torch.finfo(torch.float64).min), values
    )
    return drawn.gather(2, values.argsort(dim=2, descending=True, stable=True))


def at_tokens(maps: Float[Tensor, "m n p"], tokens: ImageTokens, targets: Targets) -> Float[Tensor, "m n t"]:
    """Maps over a sample's positions in the sequence, one per target, as maps over its image tokens.

    Args:
        maps: A value per position, of each target's sample.
        tokens: The batch's image tokens, which must stand in the sequence.
        targets: Whose maps they are.

    Raises:
        BadInputError: If tokens stand elsewhere, or maps do not have the sequence's positions.
    """
    if not tokens.point.endswith("hook_embed") or maps.shape[1:] != (len(targets), tokens.shape[1]):
        raise BadInputError(
            f"maps of shape {tuple(maps.shape)} for {len(targets)} targets and tokens at {tokens.point!r}, laid out in "
            f"{tokens.shape}; give one value per position of the sequence, or order tokens yourself (orders_of)"
        )
    place = tokens.place[targets.sample.to(tokens.place.device)].clamp_min(0).to(maps.device)
    return maps.gather(2, place.expand(len(maps), -1, -1))


def growing_sets(
    orders: Int[Tensor, "m n t"], counts: Int[Tensor, " n"], steps: int
) -> tuple[Bool[Tensor, "s m n t"], Float64[Tensor, "s n"]]:
    """The tokens that are gone after each step of a deletion, none at first and all at last; and their shares.

    Args:
        orders: Of `orders_of` or `random_orders`.
        counts: How many tokens each target's sample has.
        steps: k.

    Raises:
        BadInputError: If there are no steps, or a sample has no tokens.
    """
    if steps < 1 or int(counts.min()) < 1:
        raise BadInputError(f"steps={steps}, tokens per sample {counts.tolist()}: at least one of each")
    taken = (2 * torch.arange(steps + 1)[:, None] * counts.cpu() + steps) // (2 * steps)
    rank = orders.cpu().argsort(dim=2)
    return rank < taken[:, None, :, None], taken.double() / counts.cpu()


def deletion_curves(
    model: HookedMM,
    batch: Batch,
    targets: Targets,
    orders: Int[Tensor, "m n t"],
    tokens: ImageTokens,
    *,
    steps: int = 10,
    fill: Fill | None = None,
    kind: ScoreKind = "probability",
    keys: Sequence[int] | None = None,
    size: int = 64,
) -> Curves:
    """Deletion and insertion curves of every target, for every order; several steps run in one pass.

    Args:
        model: The model.
        batch: Pictures and prompts, with answers where targets stand in them.
        targets: What is predicted.
        orders: Per order and target, numbers of the target's tokens in the order in which they go or come.
        tokens: The batch's image tokens.
        steps: k.
        fill: What replaced tokens become; the mean of the image's own unless given.
        kind: What is measured.
        keys: Per sample, as in `Fill.instead`.
        size: Rows of one pass at most.

    Raises:
        BadInputError: If a target's sample has no image tokens, or as `ablated_scores`.
    """
    own = targets.sample.cpu()
    gone, shares = growing_sets(orders, tokens.counts.cpu()[own], steps)
    sets = torch.stack([gone, ~gone & tokens.real.cpu()[own]]).flatten(0, 2)
    found = ablated_scores(model, batch, targets, sets, fill, kind=kind, keys=keys, size=size)
    deletion, insertion = found.reshape(2, steps + 1, len(orders), len(targets)).transpose(1, 2)
    return Curves(shares, deletion, insertion)
