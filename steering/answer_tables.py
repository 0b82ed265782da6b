"""What was said, counted: accuracy per type of question, how often each answer is given, which became which.

Independent of what steering was for: a row per setting, the unsteered model (0) among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steering.answer_counts import AnswerCounts
from steering.steered_answers import Answers
from steering.tasks import references_of
from steering.vqa_accuracy import VQAAccuracy

Row = dict[str, Any]


def accuracy_by_type(answers: Answers, numbers: Sequence[int], type_column: str) -> list[Row]:
    """Accuracy (VQAv2's where there are ten references, else exact match) per type and overall, over samples.

    Args:
        answers: What was said.
        numbers: Of the settings, in the order of the answers; 0 is the unsteered model.
        type_column: The samples' column of types.

    Returns:
        Per setting and type: `setting`, `type`, `samples`, `accuracy`, `fall` (from the unsteered model's) and
        `changed`, the share of answers that are others than without steering. Samples without a known answer are left
        out.
    """
    references = references_of(answers)
    known = [place for place, found in enumerate(references) if found[0] is not None]
    kinds = [str(answers.samples[place].get(type_column)) for place in known]
    rows: list[Row] = []
    before: dict[str, float] = {}
    for number, texts in zip(numbers, answers.texts, strict=True):
        metric, changed = VQAAccuracy(), AnswerCounts()
        metric.update([texts[place] for place in known], [references[place] for place in known], kinds)
        for name, found in metric.compute().items():
            own = [place for place, kind in zip(known, kinds, strict=True) if name in (kind, "overall")]
            changed.reset()
            changed.update([answers.texts[0][place] for place in own], [texts[place] for place in own])
            rows.append(
                {
                    "setting": number,
                    "type": name,
                    "samples": found.samples,
                    "accuracy": found.value,
                    "fall": before.setdefault(name, found.value) - found.value,
                    "changed": changed.compute()["changed"],
                }
            )
    return rows


def answer_changes(answers: Answers, numbers: Sequence[int]) -> list[Row]:
    """Per setting and answer, how often it is given: `before`, `after`, and the difference, `change`."""
    rows: list[Row] = []
    for number, texts in zip(numbers, answers.texts, strict=True):
        found = _counted(answers, texts)
        before, after = found["before"], found["after"]
        for name in dict.fromkeys([*before, *after]):
            one, other = before.get(name, 0), after.get(name, 0)
            rows.append({"setting": number, "answer": name, "before": one, "after": other, "change": other - one})
    return rows


def transitions_of(answers: Answers, numbers: Sequence[int]) -> list[Row]:
    """Per setting, how often one answer became another: `before`, `after`, `samples`, the most frequent first."""
    rows: list[Row] = []
    for number, texts in zip(numbers, answers.texts, strict=True):
        pairs = _counted(answers, texts)["pairs"].items()
        moved = [(one, other, count) for (one, other), count in pairs if one != other]
        rows += [{"setting": number, "before": one, "after": other, "samples": count} for one, other, count in moved]
    return rows


def _counted(answers: Answers, texts: Sequence[str]) -> dict[str, Any]:
    metric = AnswerCounts()
    metric.update(answers.texts[0], texts)
    return metric.compute()
