"""How answers change: transitions from the answer before steering to the answer after it.

Whole answers are counted, never substrings ("no" is not in "none"), after dropping what says nothing: case, white space
at the ends, a trailing full stop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from steering.gathered import RecordMetric, check_lengths


def plain(answer: str) -> str:
    """An answer in lower case, without white space at its ends and without a trailing full stop."""
    return answer.strip().lower().removesuffix(".").rstrip()


def transitions(before: Sequence[str], after: Sequence[str]) -> dict[tuple[str, str], int]:
    """How often each answer became which; those that stayed are pairs of the same answer twice.

    Args:
        before: Answers without steering.
        after: Answers to the same questions with it.

    Returns:
        Counts of (before, after) in their `plain` form, the commonest pair first, equal counts in alphabetical order.

    Raises:
        BadInputError: If there is not one answer after for each before.
    """
    check_lengths(before=before, after=after)
    return ranked(Counter((plain(old), plain(new)) for old, new in zip(before, after, strict=True)))


def ranked(counts: Counter[Any]) -> dict[Any, int]:
    """Counts as a dict, the highest first, equal ones in the order of their keys."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Counts added up by name."""
    total: Counter[str] = Counter()
    for name, count in pairs:
        total[name] += count
    return ranked(total)


class AnswerCounts(RecordMetric):
    """Answers before and after steering: how many of each, which became which, how many changed."""

    def update(self, before: Sequence[str], after: Sequence[str]) -> None:
        """Add answers to the same questions without and with steering.

        Raises:
            BadInputError: If there is not one answer after for each before.
        """
        self.keep((old, new, count) for (old, new), count in transitions(before, after).items())

    def compute(self) -> dict[str, Any]:
        """Counts over all processes.

        Returns:
            `before` and `after` (how often each answer was given), `pairs` (see `transitions`), `samples`, and
            `changed`, the share of samples whose answer is another one; NaN of none.
        """
        total: Counter[tuple[str, str]] = Counter()
        for old, new, count in self.records():
            total[old, new] += count
        samples = total.total()
        moved = sum(count for (old, new), count in total.items() if old != new)
        return {
            "before": sums((old, count) for (old, _), count in total.items()),
            "after": sums((new, count) for (_, new), count in total.items()),
            "pairs": ranked(total),
            "samples": samples,
            "changed": moved / samples if samples else float("nan"),
        }
