"""Rows of a store as occurrences: which word each is of, in which sentence, in a context that is new or there already.

A text position's word is its token; a picture's are its patches, numbered in the order of its positions, so that one
patch position over pictures is a word. A sentence is a sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int

from analyses.contexts import ROUNDING, fingerprints, first_of_context
from analyses.layers import Layers
from analyses.splits import joined
from hooked_mm.errors import unknown

IntArray = Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Occurrences:
    """What a table of rows says of each.

    Attributes:
        names: The words; of pictures `patch 0`, `patch 1`, ...
        words: Per row the number of its word; -1 for a row that has none, as the store kept no token.
        samples: Per row the number of its sample.
        firsts: Per row the first row of the same context, itself if it is that.
        notes: What could not be told.
    """

    names: list[str]
    words: IntArray
    samples: IntArray
    firsts: IntArray
    notes: list[str]

    @classmethod
    def of(cls, layers: Layers, device: torch.device | str = "cpu") -> Occurrences:
        """Those of a store's rows; contexts are told apart at its deepest layer, which is read once.

        Args:
            layers: All layers that there are.
            device: Where arithmetic takes place.
        """
        samples, notes = layers.samples, []
        names, words, patches = numbered_words(layers)
        deepest = layers.numbers[-1]
        firsts = np.arange(len(words))
        if deepest == 0:
            notes.append(
                "only layer 0 is there, at which contexts can't be told apart: repeated ones are among the rows"
            )
        else:
            prints, rounding = [], 0.0
            for _, values in layers.batches([deepest]):
                rounding = ROUNDING.get(values[deepest].dtype, rounding)
                prints.append(fingerprints(values[deepest].to(device)).cpu())
            firsts = first_of_context(torch.cat(prints), words, rounding) if prints else firsts
        sizes = np.unique(np.bincount(samples[patches >= 0])[np.unique(samples[patches >= 0])])
        if len(sizes) > 1:
            notes.append(
                f"pictures have {sizes[0]} to {sizes[-1]} patches, so a patch's number is not the same place in all"
            )
        return cls(names, words, samples, firsts, notes)


def numbered_words(layers: Layers) -> tuple[list[str], IntArray, IntArray]:
    """The words of rows, per row the number of its own or -1, and per row its patch or -1; no values are read."""
    patches = _patches(layers.store.rows.column("modality").to_pylist(), layers.samples)
    labels = [
        word if patch < 0 else f"patch {patch}" for word, patch in zip(layers.words, patches.tolist(), strict=True)
    ]
    names = list(dict.fromkeys(label for label in labels if label is not None))
    number = {name: place for place, name in enumerate(names)}
    return names, np.array([-1 if label is None else number[label] for label in labels], dtype=int), patches


def _patches(modality: list[str | None], samples: IntArray) -> IntArray:
    """Per row its number among the image rows of its sample, which stand in order; -1 for rows of other modalities."""
    image = np.array([kind == "image" for kind in modality], dtype=bool)
    found = np.full(len(image), -1)
    own = samples[image]
    _, starts, places = np.unique(own, return_index=True, return_inverse=True)
    order = np.argsort(own, kind="stable")
    rank = np.empty(len(own), dtype=int)
    rank[order] = np.arange(len(own))
    counts = np.bincount(places) if len(own) else np.zeros(0, int)
    found[image] = rank - (np.cumsum(counts) - counts)[places] if len(starts) else []
    return found


def pictures(layers: Layers, seen: Occurrences, column: str | None = None) -> tuple[IntArray, list[str]]:
    """Which samples must not be parted, as they share a picture.

    They do if the store says so (`image` is a path), or if the last patches of both have one context: a picture that
    stands before the question leaves the same there whatever is asked.

    Args:
        layers: Of all rows.
        seen: Their occurrences.
        column: Of the samples' table: samples of equal values stay together, instead.

    Returns:
        Per sample the number of its group; and what a reader must know.

    Raises:
        BadInputError: If there is no such column.
    """
    table: pa.Table = layers.store.samples
    if column is not None:
        if column not in table.column_names:
            raise unknown("column", column, table.column_names)
        return _alike(table.column(column).to_pylist()), []
    count = table.num_rows
    paths = table.column("image").to_pylist() if "image" in table.column_names else [None] * count
    by_path = _alike([path or number for number, path in enumerate(paths)])
    image = np.flatnonzero([kind == "image" for kind in layers.store.rows.column("modality").to_pylist()])
    # Of an array with repeated places the last value stays: the last image row of each sample.
    last = np.full(count, -1)
    last[seen.samples[image]] = image
    last = last[last >= 0]
    ties = seen.samples[last], seen.samples[seen.firsts[last]]
    first_of_path = np.unique(by_path, return_index=True)[1][by_path]
    groups = joined(count, np.concatenate([ties[0], np.arange(count)]), np.concatenate([ties[1], first_of_path]))
    blind = not len(last) and all(path is None for path in paths)
    notes = ["which samples share a picture is not in the store; if some do, name a column that says so"] * blind
    shared = count - len(np.unique(groups))
    return groups, notes + [f"{shared} of {count} samples share a picture with another"] * bool(shared)


def _alike(values: Iterable[Any]) -> IntArray:
    """Values as numbers, equal ones as the same; lists too."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(repr(value), len(seen)) for value in values], dtype=int)
