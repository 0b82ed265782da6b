"""A module's tensor in the shape that a hook point's name promises, and back, written without our own code."""

from __future__ import annotations

import torch
from torch import Tensor


def show(value: Tensor, view: str, batch: int) -> Tensor:
    """A module's tensor in the promised shape."""
    kind, *numbers = view.split() or [""]
    if kind == "heads":
        return value.reshape(*value.shape[:-1], int(numbers[0]), -1)
    if kind == "gated":
        # Every head's query, then its gate.
        return value.reshape(*value.shape[:-1], int(numbers[0]), 2, -1)[..., 0, :]
    if kind == "fused":
        index, heads = map(int, numbers)
        return value.chunk(3, dim=-1)[index].reshape(*value.shape[:-1], heads, -1)
    if kind == "grouped":
        # All queries, then fewer keys, then as many values.
        index, heads, fewer = map(int, numbers)
        width = value.shape[-1] // (heads + 2 * fewer)
        start, count = ((0, heads), (heads, fewer), (heads + fewer, fewer))[index]
        return value[..., start * width : (start + count) * width].reshape(*value.shape[:-1], count, width)
    if kind == "by_head":
        # Each head's query, key and value.
        index, heads = map(int, numbers)
        return value.reshape(*value.shape[:-1], heads, 3, -1)[..., index, :]
    if kind == "half":
        return value.chunk(2, dim=-1)[int(numbers[0])]
    if kind == "map":
        return value.permute(0, 2, 3, 1).flatten(1, 2)
    if kind == "grid":
        return value.flatten(1, 2)
    if kind == "list":
        return torch.cat(list(value))
    if kind == "tiles":
        return value.reshape(value.shape[0] * value.shape[1], -1, value.shape[-1])
    return value.reshape(batch, -1, value.shape[-1]) if kind == "rows" else value


def unshow(new: Tensor, value: Tensor, view: str) -> Tensor:
    """The module's tensor with this value in it."""
    kind, *numbers = view.split() or [""]
    if kind == "fused":
        whole = value.clone()
        width = value.shape[-1] // 3
        whole[..., int(numbers[0]) * width : (int(numbers[0]) + 1) * width] = new.flatten(-2)
        return whole
    if kind == "grouped":
        whole = value.clone()
        index, heads, fewer = map(int, numbers)
        width = value.shape[-1] // (heads + 2 * fewer)
        start = (0, heads, heads + fewer)[index] * width
        whole[..., start : start + new.shape[-2] * width] = new.flatten(-2)
        return whole
    if kind == "by_head":
        whole = value.clone()
        index, heads = map(int, numbers)
        whole.view(*value.shape[:-1], heads, 3, -1)[..., index, :] = new
        return whole
    if kind == "gated":
        whole = value.clone()
        whole.view(*value.shape[:-1], int(numbers[0]), 2, -1)[..., 0, :] = new
        return whole
    if kind == "half":
        halves = list(value.chunk(2, dim=-1))
        halves[int(numbers[0])] = new
        return torch.cat(halves, dim=-1)
    if kind == "map":
        return new.permute(0, 2, 1).reshape(value.shape)
    if kind == "list":
        return list(new.split([len(part) for part in value]))
    return new.reshape(value.shape)
