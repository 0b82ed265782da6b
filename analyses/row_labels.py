"""What a probe is to read off a row, as numbers: the row's word, or what the store's table of samples says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from analyses.layers import Layers
from hooked_mm.errors import BadInputError, unknown

WORD = "word"
"""The label that is a row's own."""


@dataclass(frozen=True)
class RowLabels:
    """Labels of rows.

    Attributes:
        names: Of the labels.
        numbers: Per row that of its label; -1 for a row without one.
    """

    names: list[str]
    numbers: Int[np.ndarray, " n"]


def row_labels(layers: Layers, label: str, fact: str | None = None) -> RowLabels:
    """The labels of a store's rows.

    Args:
        layers: The rows.
        label: `word`, or a column of the table of samples. Of a list, its only item; rows of samples with none or
            several have no label.
        fact: In a column of lists: whether this item is among them (`facts` and `colour=red`), yes or no.

    Raises:
        BadInputError: For a column that there is not, one of fractions, or a fact that no sample or every sample has.
    """
    if label == WORD:
        if fact is not None:
            raise BadInputError(
                f"fact={fact!r} is one of a column of lists, but label is a row's word; name the column"
            )
        values: list[Any] = list(layers.words)
    else:
        table = layers.store.samples
        if label not in table.column_names:
            raise unknown("column", label, [WORD, *table.column_names])
        column = table.column(label).to_pylist()
        told = [_of_sample(value, label, fact) for value in column]
        if fact is not None and len(set(told)) < 2:
            known = sorted({str(item) for value in column for item in value or []})
            many = "every" if told and told[0] == "yes" else "no"
            raise BadInputError(
                f"{many} sample has {fact!r} in {label!r}, so there is nothing to tell; there are: {known}"
            )
        values = [told[sample] for sample in layers.samples]
    names = sorted({value for value in values if value is not None})
    number = {name: place for place, name in enumerate(names)}
    return RowLabels(names, np.array([-1 if value is None else number[value] for value in values], dtype=int))


def _of_sample(value: Any, label: str, fact: str | None) -> str | None:
    """The label of one sample, as text."""
    several = isinstance(value, list)
    if fact is not None:
        if value is not None and not several:
            raise BadInputError(f"{label!r} is no column of lists, it says {value!r}; leave fact out")
        return None if value is None else "yes" if fact in value else "no"
    if several:
        value = value[0] if len(value) == 1 else None
    if isinstance(value, float):
        raise BadInputError(f"{label!r} says {value}, and a probe tells kinds, not amounts; choose another column")
    return None if value is None else str(value)
