"""How much attention every head of every layer gives to a kind of key, token by token.

    share[n, l, h] = sum over k in S of A^l[h, t_n, k]        mean = share / |S|

S: what `key_groups` tells apart, and columns of one's own. Rows are taken while the model runs and added up at once, a
few at a time: an answer of a hundred tokens costs a hundred numbers per head and kind of key, never its rows of all
layers (`attention_views` keeps those of the layers that maps are wanted of).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from analyses.attention_views import column_share, rows_by_sample, sees_by
from analyses.key_groups import key_groups
from analyses.targets import Targets, Which, answer_targets, special_ids
from hooked_mm.attention_rows import Part, each_row, pattern_layers
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.hooked import HookedMM

CHUNK = 32
"""Rows at a time."""


@dataclass(frozen=True)
class AttentionShares:
    """Shares of attention of the rows that predict answer tokens.

    Attributes:
        targets: The tokens, n of them.
        layers: Numbers of the layers that have the attention.
        shares: Kind of key -> how much of each row goes there.
        counts: Kind of key -> how many there are for each token.
        part: `attn`, or `xattn` for cross-attention.
    """

    targets: Targets
    layers: list[int]
    shares: Mapping[str, Float64[Tensor, "n layers heads"]]
    counts: Mapping[str, Int[Tensor, " n"]]
    part: Part = "attn"

    def by_head(self, column: str, *, share: bool = True) -> Float64[Tensor, "n layers heads"]:
        """Heads x layers of every token: the share of a kind of key, or its mean; NaN where there is no such key.

        Raises:
            BadInputError: For an unknown kind.
        """
        if column not in self.shares:
            raise unknown("columns", column, self.shares)
        count = self.counts[column][:, None, None]
        found = self.shares[column] if share else self.shares[column] / count
        return found.masked_fill(count == 0, torch.nan)

    def by_layer(self) -> Float64[Tensor, "layers columns"]:
        """The share of every kind of key, 0 of one that is not there: means over tokens and heads."""
        return torch.stack([value.mean((0, 2)) for value in self.shares.values()], dim=1)


def picture_columns(batch: Batch, targets: Targets, part: Part = "attn") -> dict[str, Bool[Tensor, "n k"]]:
    """Each picture as a kind of key of its own, `picture 1` and so on; none where keys are not the batch's positions.

    Args:
        batch: One sample, or samples of as many pictures.
        targets: The tokens.
        part: The attention.
    """
    if batch.layout.kind == "cross" or (part == "attn" and batch.decoder is not None):
        return {}
    index, first = batch.image_index, torch.zeros(len(batch), dtype=torch.long)
    counts = torch.bincount(batch.image_sample.cpu(), minlength=len(batch))
    first[1:] = counts.cumsum(0)[:-1]
    own = index - first.to(index.device)[:, None]
    numbers = [(own == number) & (index >= 0) for number in range(int(counts.max()))]
    return {f"picture {number + 1}": mask[targets.sample.to(mask.device)] for number, mask in enumerate(numbers)}


def attention_shares(
    model: HookedMM,
    batch: Batch,
    which: Which = "all",
    part: Part | None = None,
    columns: Mapping[str, Bool[Tensor, "n k"]] | None = None,
) -> AttentionShares:
    """The shares of all layers and heads, in one pass.

    Args:
        model: The model.
        batch: With answers, as `generate(...).batch` has them; padded on either side.
        which: Tokens of the answers; see `targets.answer_targets`.
        part: Self-attention or cross-attention; unless given, the one by which the text sees the picture.
        columns: Kinds of keys of one's own: name -> the keys of each token, as from `attention_views.clicked_columns`.

    Raises:
        BadInputError: If there are no such tokens or no such attention, or columns of another shape; as `each_row`.
    """
    targets = answer_targets(batch, which, special_ids(model))
    part = part or sees_by(model, batch)
    layers = pattern_layers(model, part=part)
    if not layers:
        raise BadInputError(f"this {model.structure.family} has no {part} patterns to look at")
    rows, slot = rows_by_sample(targets, len(batch))
    masks: dict[str, Tensor] = {}
    found: dict[str, list[list[Tensor]]] = {}

    def visit(layer: int, start: int, pattern: Tensor) -> None:
        heads, width = pattern.shape[1], pattern.shape[3]
        if not masks:
            groups = key_groups(batch, width, part)
            masks.update({name: mask[targets.sample.to(mask.device)] for name, mask in groups.items()})
            if part == "attn":
                # What is said later is nothing that could be attended to, and has no part in a mean.
                said = torch.arange(width)[None] <= targets.row[:, None].cpu()
                masks["answer"] = masks["answer"] & said.to(masks["answer"].device)
            for name, mask in (columns or {}).items():
                if tuple(mask.shape) != (len(targets), width):
                    raise BadInputError(
                        f"columns {name!r} of shape {tuple(mask.shape)}; they are a mask of {(len(targets), width)}"
                    )
                masks[name] = mask
            for name in masks:
                found[name] = [[torch.zeros(heads, dtype=torch.float64)] * len(targets) for _ in layers]
        here = ((slot >= start) & (slot < start + pattern.shape[2])).nonzero()[:, 0]
        own = pattern[targets.sample[here].to(pattern.device), :, (slot[here] - start).to(pattern.device)]
        for name, mask in masks.items():
            for place, value in zip(here.tolist(), column_share(own, mask[here.to(mask.device)]).cpu(), strict=True):
                found[name][layers.index(layer)][place] = value

    each_row(model, batch, rows, visit, layers, part=part, chunk=CHUNK)
    shares = {name: torch.stack([torch.stack(own) for own in value], dim=1) for name, value in found.items()}
    return AttentionShares(targets, layers, shares, {name: mask.sum(1).cpu() for name, mask in masks.items()}, part)
