"""Attention knockout: which positions must read which others, and in which layers, for the answer to be right.

Geva et al. 2023 (arXiv 2304.14767). In a window of neighbouring layers the attention from one group of positions to
another is cut, on the attention weights themselves (`hooked_mm.knockout`): the others of a row grow so that it sums to
1 again, which is the softmax without those scores. Told is what the cut changes, per window and pair of groups:

    of the probability     (p_cut - p) / p
    of the difference      LD_cut - LD       the answer's logit less its foil's, at the row that predicts it

A position is left to read itself where both groups hold it: cutting `object` from `object` keeps a patch from the
others, not from itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from analyses.position_groups import Groups, Masked
from analyses.tail_logits import tail_logits
from analyses.targets import Targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.knockout import KnockOut

Change = Literal["probability", "difference"]


@dataclass(frozen=True)
class Cut:
    """Queries of one group that may no longer read keys of another."""

    queries: str
    keys: str

    def __str__(self) -> str:
        return f"{self.queries} -> {self.keys}"


CUTS = (
    Cut("last", "object"),
    Cut("last", "other patches"),
    Cut("last", "image"),
    Cut("last", "subject"),
    Cut("last", "question"),
    Cut("subject", "object"),
    Cut("subject", "image"),
    Cut("question", "object"),
    Cut("question", "other patches"),
    Cut("question", "image"),
    Cut("object", "other patches"),
    Cut("other patches", "object"),
    Cut("object", "object"),
)
"""What is cut unless told: every way from the picture to the answer, in the names of `position_groups`."""


def windows(n_layers: int, size: int | None = None) -> list[range]:
    """Windows of so many layers around every layer, shorter at both ends; a fifth of all unless told.

    Args:
        n_layers: How many layers there are.
        size: Layers in a window; of an even number one more lies before its layer than behind.

    Raises:
        BadInputError: If the size is not between 1 and the number of layers.
    """
    wide = max(1, round(n_layers / 5)) if size is None else size
    if not 1 <= wide <= n_layers:
        raise BadInputError(f"windows of {wide} layers of {n_layers}; take 1 to {n_layers}")
    before = wide // 2
    return [range(max(0, layer - before), min(n_layers, layer - before + wide)) for layer in range(n_layers)]


@dataclass(frozen=True)
class Scores:
    """What a run says of its targets.

    Attributes:
        probability: Of each target's token.
        difference: Its logit less its foil's; without foils, its logit.
    """

    probability: Float64[Tensor, "*s n"]
    difference: Float64[Tensor, "*s n"]

    def change(self, base: Scores, kind: Change = "probability") -> Float64[Tensor, "*s n"]:
        """What it changes against another run: (p - p0) / p0, or LD - LD0.

        Raises:
            BadInputError: For another kind.
        """
        if kind == "probability":
            return (self.probability - base.probability) / base.probability
        if kind != "difference":
            raise BadInputError(f"kind={kind!r}; it is 'probability' or 'difference'")
        return self.difference - base.difference


def scores(model: HookedMM, batch: Batch, targets: Targets, cuts: Sequence[KnockOut] = ()) -> Scores:
    """What a run with attention cut says of its targets."""
    with torch.no_grad():
        logits, own = tail_logits(model, batch, targets, cuts)
    alone = Targets(own.sample, own.row, own.token)
    found = alone.scores(logits, "log_prob").double().exp(), own.scores(logits).double()
    return Scores(*(one.cpu() for one in found))


def known_cuts(groups: Groups, cuts: Sequence[Cut] = CUTS) -> list[Cut]:
    """Those of which both groups are there."""
    return [cut for cut in cuts if cut.queries in groups and cut.keys in groups]


def knocked_out(
    model: HookedMM,
    batch: Batch,
    targets: Targets,
    groups: Groups,
    cuts: Sequence[Cut],
    layers: Sequence[Sequence[int]],
) -> Scores:
    """What runs say in which one group may not read another in one window of layers.

    Args:
        model: A model whose attention weights can be written.
        batch: What it is given.
        targets: One per sample.
        groups: Masks over the positions.
        cuts: Pairs of them.
        layers: Windows (`windows`).

    Returns:
        (windows, cuts, n); NaN for a sample that has no position of one of the groups.

    Raises:
        BadInputError: If a group is not there.
        UnknownHookError: If a layer has no attention weights (a linear attention, for instance).
    """
    if missing := [name for cut in cuts for name in (cut.queries, cut.keys) if name not in groups]:
        raise BadInputError(f"there is no group {missing[0]!r}; there are {', '.join(groups)}")
    shape = (len(layers), len(cuts), len(targets))
    made = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2)]
    for place, window in enumerate(layers):
        for number, cut in enumerate(cuts):
            queries, keys = (groups[name] for name in (cut.queries, cut.keys))
            there = (queries.any(1) & keys.any(1)).cpu()[targets.sample.cpu()]
            found = scores(model, batch, targets, [knockout(batch, queries, keys, window)])
            for whole, values in zip(made, (found.probability, found.difference), strict=True):
                whole[place, number] = torch.where(there, values, torch.nan)
    return Scores(*made)


def knockout(batch: Batch, queries: Tensor, keys: Tensor, layers: Sequence[int]) -> KnockOut:
    """The intervention that cuts the attention of positions to others, but for a position's to itself.

    Args:
        batch: What the model is given.
        queries: (b, p), who may no longer read.
        keys: (b, p), what may no longer be read.
        layers: In which layers.
    """
    readers, read = (Masked.of_positions(batch, mask) for mask in (queries, keys))
    return KnockOut(list(layers), readers, read, spare_self=True)
