"""Which fine-grained vectors are worth having: pairs of concepts ranked by what they do to answers.

    gained(a)   count of answer a after - count before           (arXiv 2501.03012, section 5.2)
    clean(a)    of the answers that changed, the share that went from a source answer to a
    score       min(gained(a), answers that went from a source answer to a) clean(a), for the best a of the pair

Counts alone are blind to damage: a vector that turns a hundred answers into "red" and a thousand others into each other
gains as much as one that turns a hundred into "red" and leaves the rest.

Answers are whole ones, compared without regard to case and surrounding space. Counted by substring, as XL-VLMs does,
"no" is found in "snow" and "one" in "none".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hooked_mm.errors import BadInputError

Pair = TypeVar("Pair", bound=Hashable)
TOP = 5
"""Of how many changes of counts `real_targets` decides."""


@dataclass(frozen=True)
class PairRank:
    """What a pair's vector does.

    Attributes:
        pair: The pair.
        target: The answer that it moves to best; None if no answer is gained.
        gained: How many more answers are the target.
        clean: Of the answers that changed, the share that went from a source answer to the target; 0 if none changed.
        score: gained * clean, where of the gain only what came from source answers counts.
        changed: How many answers changed.
        targets: The answers that really gain, see `real_targets`; one, of a vector with a single meaning.
    """

    pair: Hashable
    target: str | None
    gained: int
    clean: float
    score: float
    changed: int
    targets: tuple[str, ...]


def folded(answer: object) -> str | None:
    """An answer as it is counted; None for what is missing (None, NaN, nothing but space)."""
    text = answer.strip().casefold() if isinstance(answer, str) else ""
    return text or None


def changes(before: Sequence[str | None], after: Sequence[str | None]) -> dict[str, int]:
    """Per answer how many more (or, negative, fewer) there are after; those that stay as many are left out.

    Raises:
        BadInputError: If the answers are not those of the same samples.
    """
    one, other = _paired(before, after)
    counts = Counter(answer for answer in other if answer is not None)
    counts.subtract(answer for answer in one if answer is not None)
    return {answer: count for answer, count in sorted(counts.items()) if count}


def real_targets(change: Mapping[str, int], top: int = TOP) -> list[str]:
    """The answers that a vector really moves to, as XL-VLMs decides: the upper of two clusters of the top changes.

    The two means are exact: of the cuts of the sorted changes, the one with the smallest sum of squares within both
    parts, the first of several that are equal. Changes that are all alike are one cluster.

    Args:
        change: Answer -> change of its count; those that do not gain are no targets.
        top: How many of the largest changes to look at.

    Returns:
        Largest gain first, equal ones by name.

    Raises:
        BadInputError: If `top` is not positive.
    """
    if top < 1:
        raise BadInputError(f"top={top}; at least one change must be looked at")
    gains = sorted(
        ((answer, gain) for answer, gain in change.items() if gain > 0), key=lambda item: (-item[1], item[0])
    )
    gains = gains[:top]
    values = [gain for _, gain in gains]
    if len(set(values)) < 2:
        return [answer for answer, _ in gains]
    cuts = [_within(values[:cut]) + _within(values[cut:]) for cut in range(1, len(values))]
    return [answer for answer, _ in gains[: 1 + cuts.index(min(cuts))]]


def rank_pairs(
    before: Sequence[str | None],
    after: Mapping[Pair, Sequence[str | None]],
    source: str | Collection[str] | None = None,
    target: str | None = None,
    top: int = TOP,
) -> list[PairRank]:
    """Pairs by how much, and how cleanly, their vectors move answers to one target.

    Args:
        before: An answer per sample, without steering.
        after: Pair -> an answer per sample, with its vector.
        source: The answer that is to go, or several; a change from another answer is then damage, even if it leads to
            the target. Any answer may change unless given.
        target: The answer to move to; each pair's own best unless given.
        top: See `real_targets`.

    Returns:
        Best score first; equal scores by gain, then as the pairs were given.

    Raises:
        BadInputError: If there are no samples, or answers are not those of the same samples.
    """
    if not before:
        raise BadInputError("there are no answers to rank pairs by; give at least one sample")
    names = [source] if isinstance(source, str) else source
    sources = None if names is None else {folded(name) for name in names}
    wanted = None if target is None else folded(target)
    ranks = [_rank(pair, before, answers, sources, wanted, top) for pair, answers in after.items()]
    return sorted(ranks, key=lambda rank: (-rank.score, -rank.gained))


def _rank(
    pair: Hashable,
    before: Sequence[str | None],
    after: Sequence[str | None],
    sources: set[str | None] | None,
    target: str | None,
    top: int,
) -> PairRank:
    change = changes(before, after)
    moved = [(one, other) for one, other in zip(*_paired(before, after), strict=True) if one != other]
    arrived = Counter(other for one, other in moved if sources is None or one in sources)

    def clean(answer: str) -> float:
        return arrived[answer] / len(moved) if moved else 0.0

    def score(answer: str) -> float:
        return min(change.get(answer, 0), arrived[answer]) * clean(answer)

    if target is None:
        gaining = sorted(answer for answer, gain in change.items() if gain > 0)
        target = max(gaining, key=lambda answer: (score(answer), change[answer]), default=None)
    if target is None:
        return PairRank(pair, None, 0, 0.0, 0.0, len(moved), ())
    targets = tuple(real_targets(change, top))
    return PairRank(pair, target, change.get(target, 0), clean(target), score(target), len(moved), targets)


def _paired(before: Sequence[str | None], after: Sequence[str | None]) -> tuple[list[str | None], list[str | None]]:
    if len(before) != len(after):
        raise BadInputError(f"{len(before)} answers before and {len(after)} after; give those of the same samples")
    return [folded(answer) for answer in before], [folded(answer) for answer in after]


def _within(values: Sequence[int]) -> float:
    """Sum of squared distances from the mean."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)
