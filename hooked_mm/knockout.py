"""Attention knockout: positions that may no longer read from others (Geva et al. 2023, arXiv 2304.14767)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.interventions import Act, Intervention
from hooked_mm.positions import ALL, At, as_rule
from hooked_mm.runner import Hook
from hooked_mm.value_layout import head_mask, row_layout, whole_numbers
from hooked_mm.vectors import shown, wide


def cut(pattern: Float[Tensor, "b heads q k"], removed: Bool[Tensor, "b #heads q k"]) -> Float[Tensor, "b heads q k"]:  # noqa: F821
    """Attention without some of its entries, the others grown so that each row sums to 1 again.

    Equals the softmax with -inf added to the removed scores: a_k / (sum of the kept a). A row with nothing left becomes
    zero: that position reads nothing in that head (where -inf everywhere would give NaN). Rows that lose nothing stay
    bit for bit. An entry that the softmax had already rounded to zero stays zero.

    Args:
        pattern: Softmaxed attention.
        removed: Which entries go.
    """
    values = wide(pattern)
    kept = values.masked_fill(removed, 0)
    total = kept.sum(dim=-1, keepdim=True)
    grown = kept / total.where(total > 0, 1)
    touched = (removed & (values > 0)).any(dim=-1, keepdim=True)
    return grown.to(pattern.dtype).where(touched, pattern)


@dataclass(frozen=True, eq=False, repr=False)
class KnockOut(Intervention):
    """Cuts attention from query positions to key positions, in a forward pass and in every step of a generation.

    Works on `hook_pattern`, so the layers concerned compute their attention eagerly. At step s of a generation the
    query is the newest token (role answer), and the keys are the prompt's positions and the tokens generated so far.

    Attributes:
        layers: Layer numbers from 0, one or several; None for all.
        queries: Who may no longer read: a position rule or a short form of one.
        keys: What may no longer be read.
        heads: Only in these heads; None for all.
        tower: In the vision tower instead of the language model; rules then choose patches.
        spare_self: A position that is among both may go on reading itself.
    """

    layers: int | Sequence[int] | None = None
    queries: At = ALL
    keys: At = ALL
    heads: int | Sequence[int] | None = None
    tower: bool = False
    spare_self: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("queries", "keys"):
            object.__setattr__(self, name, as_rule(getattr(self, name)))
        if self.heads is not None:
            object.__setattr__(self, "heads", whole_numbers("heads", self.heads))
        if self.layers is None:
            return
        object.__setattr__(self, "layers", whole_numbers("layers", self.layers))
        if min([self.layers] if isinstance(self.layers, int) else self.layers) < 0:
            raise BadInputError(f"layers={self.layers!r}; they are counted from 0")

    def acts(self) -> list[Act]:
        """One act at the patterns of the layers."""
        layers = ["*"] if self.layers is None else [self.layers] if isinstance(self.layers, int) else self.layers
        prefix = "vision." if self.tower else ""
        return [Act([f"{prefix}blocks.{layer}.attn.hook_pattern" for layer in layers], self.apply)]

    def apply(self, value: Tensor, hook: Hook, where: Tensor | None = None) -> Tensor:
        """The cut pattern.

        Args:
            value: (rows, heads, queries, keys); both hold the last positions there are.
            hook: Where it was met.
            where: (rows, queries), narrows the queries.

        Raises:
            BadInputError: If the shape does not fit the batch, a rule makes no sense there, or a head does not exist.
        """
        rows, heads, count, length = value.shape
        here, there = (row_layout(hook, rows, size) for size in (count, length))
        queries, keys = (
            as_rule(rule).mask(places).to(value.device) for rule, places in ((self.queries, here), (self.keys, there))
        )
        if where is not None:
            queries = queries & where.to(value.device)
        chosen = head_mask(self.heads, heads, hook.name, value.device)
        removed = queries[:, None, :, None] & keys[:, None, None, :] & chosen[:, None, None]
        if self.spare_self:
            # Both hold the last positions that there are: the last query is the last key.
            itself = torch.eye(length, dtype=torch.bool, device=value.device)[length - count :]
            removed = removed & ~itself
        return cut(value, removed)

    def __repr__(self) -> str:
        return shown(self)
