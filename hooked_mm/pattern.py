"""The equation of an attention pattern: as a whole, and row by row from the queries of those rows alone.

    pattern = softmax(cap(q k^T * scaling) + bias + mask)

A whole pattern is (batch, heads, q, k); some rows of it cost (batch, heads, rows, k) and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def eager_attention(
    query: Float[Tensor, "b heads q d"],
    key: Float[Tensor, "b heads k d"],
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    bias: Float[Tensor, "#b heads q k"] | None = None,
) -> Float[Tensor, "b heads q k"]:
    """Attention pattern softmax(cap(q k^T * scaling) + mask), in at least float32, cast to the queries' dtype.

    Args:
        query: After rotary embedding.
        key: After rotary embedding, one per query head.
        mask: Additive, or boolean with True where attention is allowed; None for everything.
        scaling: Usually 1 / sqrt(d_head).
        softcap: Scores become softcap * tanh(scores / softcap) (Gemma 2).
        sinks: A further score per head that takes its share and gives nothing (rows then sum to less than 1).
        bias: Added to the scores: one number per head and distance (T5).
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    return _normalised(scores, mask, softcap, sinks, bias).to(query.dtype)


def _normalised(
    scores: Tensor, mask: Tensor | None, softcap: float | None, sinks: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Scores (b, heads, q, k) as a pattern, in at least float32."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        mask = mask[..., : scores.shape[3]]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if sinks is not None:
        extra = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, extra], dim=-1).softmax(dim=-1, dtype=wide)[..., :-1]
    return scores.softmax(dim=-1, dtype=wide)


def pick_rows(
    pattern: Float[Tensor, "#b #heads #q k"], rows: Int[Tensor, "b r"], heads: Int[Tensor, " h"] | None = None
) -> Float[Tensor, "b #h r k"]:  # noqa: F821
    """Rows of a pattern, mask or bias; dimensions of size one stand for all samples, heads or rows.

    Args:
        pattern: The whole.
        rows: Per sample, the numbers of the rows.
        heads: Their numbers; None for all.
    """
    if heads is not None and pattern.shape[1] > 1:
        pattern = pattern[:, heads]
    rows = rows.to(pattern.device)
    sample = torch.arange(len(rows), device=rows.device)[:, None]
    row = rows.clamp(max=pattern.shape[2] - 1)
    return pattern.expand(len(rows), -1, -1, -1)[sample, :, row].transpose(1, 2)


def image_of(bounds: Int[Tensor, " n"], length: int, device: torch.device) -> Int[Tensor, " length"]:
    """Which image each place of a packed row belongs to."""
    return torch.bucketize(torch.arange(length, device=device), bounds[1:].to(device), right=True)


def block_mask(bounds: Int[Tensor, " n"], length: int, device: torch.device) -> Bool[Tensor, "1 1 length length"]:
    """True within one image."""
    image = image_of(bounds, length, device)
    return (image[:, None] == image[None, :])[None, None]


@dataclass(frozen=True)
class PatternRows:
    """A pattern of which rows can be had one by one.

    Attributes:
        shape: (batch, heads, q, k) of the whole pattern.
        take: From rows (b, r) int64, and the numbers of heads or None for all, to (b, heads, r, k).
    """

    shape: tuple[int, ...]
    take: Callable[[Tensor, Tensor | None], Tensor]


def rows_of(pattern: Float[Tensor, "b heads q k"]) -> PatternRows:
    """Rows of a pattern that is there as a whole."""
    return PatternRows(tuple(pattern.shape), partial(pick_rows, pattern))


def row_patterns(
    module: Any,
    query: Float[Tensor, "b heads q d"],
    key: Float[Tensor, "b kv_heads k d"],
    mask: Tensor | None,
    bounds: Int[Tensor, " n"] | None,
    options: Mapping[str, Any],
    rows: Int[Tensor, "b r"],
    heads: Int[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h r k"]:
    """Rows of a pattern from the queries of these rows alone.

    Args:
        module: The attention module, which says whether it is causal where the call does not.
        query: Of all positions, after rotary embedding.
        key: One per head, or per group of heads that share it.
        mask: Additive or boolean, for all rows; None for none, or a causal one.
        bounds: Of the images in a packed row, whose places see their own image only.
        options: Of the call: `scaling`, `softcap`, `s_aux`, `position_bias`, `is_causal`.
        rows: Per sample, the numbers of the rows.
        heads: Their numbers; None for all.
    """
    rows = rows.to(query.device)
    if bounds is not None:
        image = image_of(bounds, key.shape[2], key.device)
        mask = (image[rows][..., None] == image)[:, None]
    elif mask is not None:
        mask = pick_rows(mask, rows, heads)
    elif query.shape[2] > 1 and causal(module, options):
        mask = torch.arange(key.shape[2], device=rows.device) <= rows[:, None, :, None]
    bias, sinks = options.get("position_bias"), options.get("s_aux")
    own = pick_rows(query, rows, heads)
    repeats = query.shape[1] // key.shape[1]
    if heads is None:
        # Heads that share a key stand behind each other as its rows, which needs no copy of the keys.
        shared = own.unflatten(1, (key.shape[1], repeats)).flatten(2, 3)
        scores = torch.matmul(shared, key.transpose(2, 3)).unflatten(2, (repeats, -1)).flatten(1, 2)
    else:
        scores = torch.matmul(own, key[:, heads // repeats].transpose(2, 3))
        sinks = None if sinks is None else sinks[heads]
    scaling = options.get("scaling")
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    bias = None if bias is None else pick_rows(bias, rows, heads)
    return _normalised(scores, mask, options.get("softcap"), sinks, bias).to(query.dtype)


def causal(module: Any, options: Mapping[str, Any]) -> bool:
    """Whether attention without a mask sees the past only, as SDPA has it."""
    told = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if told is None else told)
