"""Sets of a store's rows, by conditions on any column: what a steering vector leads from, and what it leads to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from torch import Tensor

from concept_dict.row_choice import selectors_of
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.store import ActivationStore
from hooked_mm.store_format import ROW_COLUMNS

Where = Mapping[str, Any] | Literal["all", "random"]
"""Conditions as `ActivationStore.where` takes them; all rows; or as many random ones as the other set has."""

TRUTH = {True: ("yes", "true", "on"), False: ("no", "false", "off")}
"""Words that YAML reads as truth values, even in quotes; as answers they are words."""
SHOWN = 8
"""Values of a column that an error names."""


@dataclass(frozen=True)
class RowSet:
    """Some rows of a store.

    Attributes:
        store: The part of it that meets the conditions.
        index: Which of the part's rows.
        where: How they were chosen.
    """

    store: ActivationStore
    index: Int[np.ndarray, " n"]
    where: Where

    def __len__(self) -> int:
        return len(self.index)

    @property
    def name(self) -> str:
        """What it is called: "all", "random", or the values that its columns have."""
        if isinstance(self.where, str):
            return self.where
        parts = (value if isinstance(value, list | tuple) else [value] for value in self.where.values())
        return ", ".join(" or ".join(map(str, part)) for part in parts)

    def activations(self, hook: str) -> Float[Tensor, "n d"]:
        """Its rows at a hook."""
        return self.store.activations(hook, self.index)

    def places(self) -> set[tuple[int, int]]:
        """Where each of its rows lies on disk, which tells rows apart."""
        shards, rows = (self.store.rows.column(name).to_numpy()[self.index] for name in ("shard", "row"))
        return set(zip(shards.tolist(), rows.tolist(), strict=True))

    def column(self, name: str) -> list[Any]:
        """Per row what a column of the rows or of their samples holds.

        Raises:
            BadInputError: If there is no such column.
        """
        samples, rows = self.store.samples, self.store.rows
        if name in samples.column_names:
            return samples.column(name).take(self.store.row_samples()[self.index]).to_pylist()
        if name not in rows.column_names:
            raise unknown("column", name, [*samples.column_names, *ROW_COLUMNS])
        return rows.column(name).take(self.index).to_pylist()

    def describe(self) -> dict[str, Any]:
        """For provenance: conditions and counts."""
        where = self.where if isinstance(self.where, str) else dict(self.where)
        return {"where": where, "rows": len(self), "samples": len(set(self.column("sample")))}


def row_sets(
    store: ActivationStore, source: Where, target: Where | None = None, seed: int = 0
) -> tuple[RowSet, RowSet | None]:
    """The source rows and, if there is one, the target rows of a store, or of a part of one.

    Args:
        store: Of rows of one selector.
        source: What a vector leads from.
        target: What it leads to.
        seed: Of random sets.

    Raises:
        BadInputError: If a set is empty (it tells what the columns hold), a column is unknown, both sets are random or
            the same, or rows are of several selectors.
    """
    names = selectors_of(store)
    if len(names) > 1:
        raise BadInputError(
            f"the store has rows of the selectors {', '.join(names)}, and a vector is of one; add the condition "
            f"{{selector: {names[0]}}} to where"
        )
    if source == "random" and target in ("random", None):
        raise BadInputError("a random set has as many rows as the other one; give conditions for the other")
    if target == "random":
        first = _chosen(store, source)
        return first, _drawn(store, len(first), seed)
    second = None if target is None else _chosen(store, target)
    first = _drawn(store, len(second), seed) if source == "random" and second is not None else _chosen(store, source)
    if second is not None and first.places() == second.places():
        raise BadInputError(
            f"source {source} and target {target} are the same {len(first)} rows; change the conditions of one, or for "
            "fine-grained vectors within one set leave the target out"
        )
    return first, second


def part_of(store: ActivationStore, where: Mapping[str, Any]) -> ActivationStore:
    """The part of a store that meets conditions, see `readable`.

    Raises:
        BadInputError: If a column is unknown or can't hold a value, or no row is left.
    """
    try:
        part = store.where(**readable(store, where))
    except (pa.ArrowException, TypeError) as error:
        raise BadInputError(
            f"conditions {dict(where)} do not fit the columns' types ({error}); {_held(store, where)}"
        ) from error
    if not len(part):
        raise BadInputError(f"no row meets {dict(where)}; {_held(store, where)}")
    return part


def readable(store: ActivationStore, where: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions with the words that columns hold, where YAML has made numbers or truth values of words.

    `{answer: yes}` reads as true, in quotes too, and `{answer: 3}` as a number.
    """
    return {name: _as_in(store, name, value) for name, value in where.items()}


def partners(one: RowSet, other: RowSet, by: str | None = None, seed: int = 0) -> tuple[list[int], list[int]]:
    """Which rows of two sets belong together, each in one pair at most.

    Args:
        one: Rows.
        other: Rows.
        by: A column of which both rows of a pair hold the same; any two rows, drawn by chance, unless given.
        seed: Of the draw.

    Returns:
        Per pair the row of either set, by number.

    Raises:
        BadInputError: If no rows belong together, or there is no such column.
    """
    if by is None:
        few, chance = min(len(one), len(other)), np.random.default_rng(seed)
        return chance.permutation(len(one))[:few].tolist(), chance.permutation(len(other))[:few].tolist()
    waiting: dict[str, list[int]] = {}
    for number, value in enumerate(other.column(by)):
        if value is not None:
            waiting.setdefault(repr(value), []).append(number)
    pairs = []
    for number, value in enumerate(one.column(by)):
        if waiting.get(repr(value)):
            pairs.append((number, waiting[repr(value)].pop(0)))
    if not pairs:
        raise BadInputError(f"no source row has the same {by!r} as a target row; pair by another column, or by none")
    return [number for number, _ in pairs], [number for _, number in pairs]


def _chosen(store: ActivationStore, where: Where) -> RowSet:
    if isinstance(where, str):
        if where != "all":
            raise BadInputError(f"rows {where!r}; give conditions, such as {{answer: red}}, or 'all' or 'random'")
        part = store
        if not len(part):
            raise BadInputError(f"the store {str(store.path)!r} has no rows left; choose by other conditions")
    else:
        part = part_of(store, where)
        where = readable(store, where)
    return RowSet(part, np.arange(len(part)), where)


def _drawn(store: ActivationStore, count: int, seed: int) -> RowSet:
    drawn = np.random.default_rng(seed).permutation(len(store))[:count]
    return RowSet(store, np.sort(drawn), "random")


def _type(store: ActivationStore, name: str) -> pa.DataType | None:
    for table in (store.samples, store.rows):
        if name in table.column_names:
            kind = table.schema.field(name).type
            return kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return None


def _values(store: ActivationStore, name: str) -> Counter[Any]:
    """How often a column of samples or rows holds what."""
    table = store.samples if name in store.samples.column_names else store.rows
    found: Counter[Any] = Counter()
    for value in table.column(name).to_pylist():
        found.update(value if isinstance(value, list) else [value])
    return found


def _as_in(store: ActivationStore, name: str, value: Any) -> Any:
    """A value as its column of words would hold it."""
    kind = _type(store, name)
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return value
    options = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
    words: list[Any] = []
    for option in options:
        if isinstance(option, bool):
            words += [word for word in _values(store, name) if str(word).casefold() in TRUTH[option]]
        else:
            words.append(str(option) if isinstance(option, int | float) else option)
    return words[0] if len(words) == 1 else words


def _held(store: ActivationStore, where: Mapping[str, Any]) -> str:
    """What the columns of conditions hold, for errors."""
    parts = []
    for name in where:
        values = _values(store, name).most_common(SHOWN + 1)
        shown = ", ".join(f"{value} ({count})" for value, count in values[:SHOWN])
        parts.append(f"{name} holds {shown}{', ...' if len(values) > SHOWN else ''}")
    return "; ".join(parts)
