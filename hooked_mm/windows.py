"""In which order a tower with windowed attention sees the merged patches of its pictures."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def window_order(sizes: Int[Tensor, "images 3"], merge: int, side: int) -> Int[Tensor, " tokens"]:
    """Which merged patch stands at each place: picture by picture, frame by frame, window by window, row by row.

    Qwen2.5-VL's towers sort so; its windows begin in the top left corner, those at the right and bottom are cut off.

    Args:
        sizes: (frames, height, width) of each picture, in patches.
        merge: merge x merge patches become one.
        side: side x side merged patches are a window.
    """
    orders, start = [torch.zeros(0, dtype=torch.long)], 0
    for frames, height, width in sizes.tolist():
        rows, cols = height // merge, width // merge
        across = cols // side + 1
        window = torch.arange(rows)[:, None] // side * across + torch.arange(cols) // side
        # Stable: inside a window cells stay row by row, as they come.
        inside = window.flatten().argsort(stable=True)
        orders.append(start + (torch.arange(frames)[:, None] * rows * cols + inside).flatten())
        start += frames * rows * cols
    return torch.cat(orders)
