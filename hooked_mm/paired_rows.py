"""Which rows of two stores belong together: the same place of the same sample, read by two models.

By position where both models read the same text, so that a position is the same place in both; by word where they read
texts of their own: the n-th "red" of one answer and the n-th "red" of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from hooked_mm.errors import BadInputError
from hooked_mm.store import ActivationStore

By = Literal["position", "word", "sample"]
STORES = ("original", "tuned")


@dataclass(frozen=True)
class Alone:
    """What of a store has no partner in the other: `samples` that the other has not, `rows` with no row there."""

    samples: int
    rows: int


@dataclass(frozen=True, eq=False)
class PairedRows:
    """Rows of two stores, pair by pair, in the order of the original's rows.

    Attributes:
        by: What they were paired by.
        original: Per pair the row of the original's store.
        tuned: Per pair the row of the fine-tuned model's.
        sample: Per pair its sample, an index into `samples`.
        samples: Ids of the samples that both stores have, in the original's order; some may have no pair.
        alone: Per store (`"original"`, `"tuned"`) what has no partner.
        warnings: What of the two stores' making may keep their rows from being comparable.
    """

    by: By
    original: Int[np.ndarray, " m"]
    tuned: Int[np.ndarray, " m"]
    sample: Int[np.ndarray, " m"]
    samples: tuple[str, ...]
    alone: Mapping[str, Alone]
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.original)

    def describe(self) -> str:
        """What was paired, what was not, and what to be wary of, in a few lines."""
        paired = len(np.unique(self.sample))
        lines = [f"{len(self)} pairs of rows by {self.by}, of {paired} of {len(self.samples)} common samples"]
        for name, other in (STORES, STORES[::-1]):
            left = self.alone[name]
            lines.append(f"{name}: {left.rows} rows without a partner; {left.samples} samples that {other} has not")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def pair_rows(original: ActivationStore, tuned: ActivationStore, by: By | Literal["auto"] = "auto") -> PairedRows:
    """The rows of two stores, or parts of stores, that belong together. Only tables are read, no activations.

    Args:
        original: The store of the original model.
        tuned: The store of the fine-tuned model.
        by: `"position"`: same sample, selector and position (a mean has none), in order where several rows share these;
            `"word"`: same sample, selector and word, the n-th with the n-th by position, rows without words as by
            sample; `"sample"`: the one row of each sample and selector; `"auto"`: by position if both stores read the
            same text of every common sample, else by word if there are words, else by sample.

    Raises:
        BadInputError: If the stores have no sample in common, or it can't be known which rows belong together.
    """
    if by not in ("auto", "position", "word", "sample"):
        raise BadInputError(f"by={by!r}; it must be 'auto', 'position', 'word' or 'sample'")
    both = (original, tuned)
    ids = [store.samples.column("sample").to_pylist() for store in both]
    shared = set(ids[0]) & set(ids[1])
    if not shared:
        raise BadInputError(
            f"{original!r} and {tuned!r} have no sample in common (one begins with {ids[0][:1]}, the other with "
            f"{ids[1][:1]}); extract the same data set by both models, see extract_pair"
        )
    samples = tuple(name for name in ids[0] if name in shared)
    differ = _texts_differ(original, tuned, shared)
    warnings = list(_incomparable(original, tuned))
    words = any(store.rows.column("word").null_count < len(store) for store in both)
    chosen: By = ("position" if differ is None else "word" if words else "sample") if by == "auto" else by
    if chosen == "position":
        if differ is not None:
            warnings.append(f"rows are paired by position, but {differ}")
    else:
        if chosen == "word" and not words:
            raise BadInputError("no row of either store has a word, so none can be paired by word; choose by='sample'")
        for name, store in zip(STORES, both, strict=True):
            _check_single(store, name, chosen, shared, differ)
    keys = _keys(original, tuned, chosen)
    _, first, second = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    order = np.argsort(first, kind="stable")
    first, second = first[order], second[order]
    place = pc.index_in(original.rows.column("sample"), value_set=pa.array(samples, pa.string())).to_numpy()
    alone = {
        name: Alone(len(mine) - len(shared), len(store) - len(first))
        for name, mine, store in zip(STORES, ids, both, strict=True)
    }
    return PairedRows(chosen, first, second, place[first].astype(np.int64), samples, alone, tuple(warnings))


def split_samples(pairs: PairedRows, shares: Sequence[float], seed: int = 0) -> list[Int[np.ndarray, " p"]]:
    """Deal the samples that have pairs into parts; all pairs of a sample are in one part.

    Args:
        pairs: What to deal out.
        shares: Of each part, together 1: shares of the samples, to the nearest whole number.
        seed: The same seed deals the same samples the same way, in whatever order they stand.

    Returns:
        Per part the indices of its pairs, ascending.

    Raises:
        BadInputError: If shares are not positive or do not make 1, or a part would have no sample.
    """
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise BadInputError(f"shares={list(shares)}; they must be positive and together 1, as (0.5, 0.5)")
    # By name, so that the order of samples does not matter.
    found = sorted(np.unique(pairs.sample).tolist(), key=lambda number: pairs.samples[number])
    dealt = np.array(found, dtype=np.int64)[np.random.default_rng(seed).permutation(len(found))]
    parts = np.split(dealt, np.rint(np.cumsum(shares)[:-1] * len(dealt)).astype(int))
    if not all(map(len, parts)):
        raise BadInputError(
            f"{len(dealt)} samples have pairs, too few for {len(parts)} parts of shares {list(shares)}: one would be "
            "empty; take more samples or fewer parts"
        )
    return [np.flatnonzero(np.isin(pairs.sample, part)) for part in parts]


def _keys(original: ActivationStore, tuned: ActivationStore, by: By) -> list[Int[np.ndarray, " n"]]:
    """Per store a number for every row, no two the same; rows that belong together have the same."""
    columns = {"position": ("sample", "selector", "position"), "word": ("sample", "selector", "word")}
    tables = [store.rows for store in (original, tuned)]
    code = np.zeros(sum(map(len, tables)), np.int64)
    for column in columns.get(by, ("sample", "selector")):
        joined = pa.concat_tables([table.select([column]) for table in tables]).column(0).combine_chunks()
        numbers = pc.dictionary_encode(joined, null_encoding="encode").indices.to_numpy()
        # Small again after each column, so that the product never grows beyond 64 bits.
        code = np.unique(code * (int(numbers.max(initial=0)) + 1) + numbers, return_inverse=True)[1].reshape(-1)
    parts = np.split(code, [len(original)])
    counts = [_how_many_before(part, table) for part, table in zip(parts, tables, strict=True)]
    most = max(int(count.max(initial=0)) for count in counts) + 1
    return [part * most + count for part, count in zip(parts, counts, strict=True)]


def _how_many_before(code: Int[np.ndarray, " n"], rows: pa.Table) -> Int[np.ndarray, " n"]:
    """Per row, how many of the same code come before it, by position and then in the table."""
    position = rows.column("position").fill_null(-1).to_numpy()
    order = np.lexsort((np.arange(len(code)), position, code))
    ordered = code[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
    lengths = np.diff(np.r_[starts, len(ordered)])
    out = np.empty(len(code), np.int64)
    out[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return out


def _check_single(store: ActivationStore, name: str, by: By, shared: set[str], differ: str | None) -> None:
    """Refuse several rows of one sample and selector that nothing tells apart."""
    rows = store.rows.filter(pc.is_in(store.rows.column("sample"), value_set=pa.array(sorted(shared), pa.string())))
    if by == "word":
        rows = rows.filter(pc.is_null(rows.column("word")))
    counts = rows.group_by(["sample", "selector"], use_threads=False).aggregate([([], "count_all")])
    several = counts.filter(pc.greater(counts.column("count_all"), 1))
    if several.num_rows:
        one = several.slice(0, 1).to_pylist()[0]
        told = "several rows" if by == "sample" else "several rows without a word"
        raise BadInputError(
            f"selector {one['selector']!r} has {told} for sample {one['sample']!r} in the {name} store"
            f"{'' if differ is None else f', and {differ}'}: which belong together is not known; extract both from the "
            "same text (extract_pair, texts='original'), leave that selector out (store.where(selector=...)), or pass "
            "by='position' if positions mean the same in both"
        )


def _texts_differ(original: ActivationStore, tuned: ActivationStore, shared: set[str]) -> str | None:
    """Why positions need not mean the same in both stores; None if both have read the same text of common samples."""
    prefixes = [store.made_by.get("answer_prefix") for store in (original, tuned)]
    if prefixes[0] != prefixes[1]:
        return f"answers begin with {prefixes[0]!r} in one and {prefixes[1]!r} in the other"
    read = []
    for name, store in zip(STORES, (original, tuned), strict=True):
        table = store.samples
        if "prompt" not in table.column_names:
            return f"the {name} store has no column 'prompt', so which text was read is not known"
        parts = [
            table.column(part).to_pylist() if part in table.column_names else [None] * len(table)
            for part in ("prompt", "text", "answer_tokens")
        ]
        read.append({sample: rest for sample, *rest in zip(table.column("sample").to_pylist(), *parts, strict=True)})
    others = sum(read[0][sample] != read[1][sample] for sample in shared)
    return f"the models have read other texts of {others} of {len(shared)} common samples" if others else None


def _incomparable(original: ActivationStore, tuned: ActivationStore) -> list[str]:
    """What of the making of two stores may keep their rows from being comparable."""
    found = []
    for one, other, name in ((original, tuned, STORES[0]), (tuned, original, STORES[1])):
        if lone := [hook for hook in one.hooks if hook not in other.hooks]:
            found.append(f"only {name} holds {', '.join(lone)}")
    for hook in sorted({*original.hooks} & {*tuned.hooks}):
        widths = [tuple(store.activations(hook, slice(0)).shape[1:]) for store in (original, tuned)]
        if widths[0] != widths[1]:
            found.append(f"vectors at {hook} have shape {widths[0]} in original and {widths[1]} in tuned")
    for what in ("family", "answer_prefix"):
        told = [store.made_by.get(what) for store in (original, tuned)]
        if told[0] != told[1]:
            found.append(f"{what} is {told[0]!r} in original and {told[1]!r} in tuned")
    chosen: list[Mapping[str, Any]] = [store.made_by.get("selectors") or {} for store in (original, tuned)]
    found += [
        f"selector {name!r} is {chosen[0].get(name)} in original and {chosen[1].get(name)} in tuned"
        for name in sorted({*chosen[0], *chosen[1]})
        if chosen[0].get(name) != chosen[1].get(name)
    ]
    return found
