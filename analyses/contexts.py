"""Which rows repeat an occurrence that is there already: one word in one context counts once.

Ethayarajh (2019) compares a word's occurrences in *unique* contexts. In a decoder, whatever stands before the first
token that differs (the beginning-of-sequence token, a template's words) is one occurrence seen in every sample, and so
is a picture that is asked about twice: counted again, such rows have similarity 1 whatever the model does.

Two rows of one word have the same context if a *deep* layer holds the same for them, up to rounding: there a
representation depends on all that its position attends to, whether attention is causal or not. (The embeddings of one
word are the same in all contexts; never look there.)
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

NUMBERS = 16
"""Of a row's fingerprint: two rows that differ agree in all of them, by chance, about never."""

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Dtype -> what two passes over one context may differ by, relative to the row's norm."""


def fingerprints(rows: Float[Tensor, "n d"], seed: int = 0) -> Float[Tensor, "n 17"]:
    """Per row 16 random projections of its direction, which keep distances (Johnson and Lindenstrauss), and log norm.

    Args:
        rows: Of any dtype; the layer should be a deep one.
        seed: Of the directions: rows that come in parts need the same.
    """
    drawn = torch.randn(rows.shape[1], NUMBERS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wide = rows.double()
    norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    safe = torch.where(norms > 0, norms, 1)
    return torch.cat([wide / safe @ drawn.to(wide.device) / NUMBERS**0.5, safe.log()], dim=1)


def first_of_context(
    prints: Float[Tensor, "n k"], words: Int[np.ndarray, " n"], tolerance: float
) -> Int[np.ndarray, " n"]:
    """Per row, the first row of the same word with the same fingerprint; its own number if it is that.

    Args:
        prints: See `fingerprints`.
        words: Per row the number of its word; rows are only compared within one.
        tolerance: Distance of two fingerprints that are the same, see `ROUNDING`.
    """
    found = np.arange(len(words))
    table = prints.cpu().numpy()
    order = np.lexsort((table[:, 0], words))
    sorted_words, table = words[order], table[order]
    # Sorted by one number, only rows that follow closely can be the same.
    near = (np.diff(table[:, 0]) <= tolerance) & (sorted_words[1:] == sorted_words[:-1])
    done = np.zeros(len(order), dtype=bool)
    for start in np.flatnonzero(near):
        if done[start]:
            continue
        stop = start + 1
        while stop < len(order) and near[stop - 1] and table[stop, 0] - table[start, 0] <= tolerance:
            stop += 1
        others = np.arange(start + 1, stop)
        same = others[(np.linalg.norm(table[others] - table[start], axis=1) <= tolerance) & ~done[others]]
        members = order[[start, *same]]
        done[same] = True
        found[members] = members.min()
    return found
