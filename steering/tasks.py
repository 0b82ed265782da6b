"""What steering is for, and what it must leave alone: tasks, which score every answer under every setting.

| task | effect: the share of | damage: the fall of |
|---|---|---|
| `AnswerTask` | answers `source` to questions of the type that become `target` | accuracy on all other types |
| `StyleTask` | captions with words of the wanted class and none of the unwanted | accuracy on all questions |

A score is a matrix (settings, samples), NaN where a sample has no part in it; the unsteered model is the first setting.
To add a task: a subclass here; its scores become columns of every table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.word_classes import words_of
from hooked_mm.words import word_pattern
from steering.answer_counts import plain
from steering.steered_answers import Answers
from steering.vqa_accuracy import answer_accuracy

Scores = dict[str, Float[Tensor, "s n"]]


@dataclass(frozen=True)
class Goal:
    """When a setting does what it shall: at least so much effect for at most so much damage."""

    effect: float = 0.9
    damage: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What shall change and what shall not.

    Attributes:
        type_column: The samples' column that says of which type they are.
        goal: What is aimed at.
    """

    type_column: str = "question_type"
    goal: Goal = field(default_factory=Goal)

    @abstractmethod
    def scores(self, answers: Answers) -> Scores:
        """Every score of every answer, `effect` and `damage` among them.

        Raises:
            BadInputError: If no sample has a part in the effect, or none in the damage.
        """

    @abstractmethod
    def about(self, answers: Answers) -> list[str]:
        """What each sample is for the task: `"source"`, `"same type"` or `"other"`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Its `name`, and what `effect` and `damage` mean, for people; and its `goal`."""

    def _told(self, name: str, effect: str, damage: str) -> dict[str, Any]:
        goal = {"effect": self.goal.effect, "damage": self.goal.damage}
        return {"name": name, "effect": effect, "damage": damage, "goal": goal}

    def _types(self, answers: Answers) -> list[Any]:
        first = answers.samples[0]
        if self.type_column not in first:
            raise BadInputError(
                f"samples have no column {self.type_column!r} that says their type; they have "
                f"{', '.join(map(str, first))}: choose one with type_column"
            )
        return [sample[self.type_column] for sample in answers.samples]


def counted(answers: Answers, who: Sequence[bool], value: Callable[[int, int], float]) -> Float[Tensor, "s n"]:
    """`value(setting, sample)` of the samples that count, NaN elsewhere."""
    return torch.tensor(
        [[value(s, n) if who[n] else nan for n in range(len(who))] for s in range(len(answers.texts))],
        dtype=torch.float32,
    )


def references_of(answers: Answers) -> list[list[Any]]:
    """Per sample what people answered: ten of them, or the one answer that is right, None where nobody knows."""
    return [sample.get("answers") or [sample["answer"]] for sample in answers.samples]


def right(answers: Answers, who: Sequence[bool]) -> Float[Tensor, "s n"]:
    """Accuracy of each answer: VQAv2's where a sample has ten references, else exact; NaN where nobody knows."""
    references = references_of(answers)
    known = [one and found[0] is not None for one, found in zip(who, references, strict=True)]
    memo: dict[tuple[str, int], float] = {}

    def accuracy(setting: int, sample: int) -> float:
        key = (answers.texts[setting][sample], sample)
        if key not in memo:
            memo[key] = answer_accuracy(key[0], references[sample])
        return memo[key]

    return counted(answers, known, accuracy)


def fall(accuracy: Float[Tensor, "s n"]) -> Float[Tensor, "s n"]:
    """How much lower than the unsteered model's, the first row."""
    return accuracy[:1] - accuracy


def kept(answers: Answers, who: Sequence[bool]) -> Float[Tensor, "s n"]:
    """Whether each text is, to the letter, what the unsteered model says."""
    texts = answers.texts
    return counted(answers, who, lambda s, n: float(texts[s][n] == texts[0][n]))


def _no_text(**given: Sequence[Any]) -> None:
    """Refuse one text where several are asked for, of which each letter would be one."""
    for name, value in given.items():
        if isinstance(value, str):
            raise BadInputError(f"{name}={value!r} is one text; write [{value!r}]")


def _some(scores: Scores, what: Mapping[str, str]) -> Scores:
    for name, missing in what.items():
        if bool(scores[name].isnan().all()):
            raise BadInputError(f"no {name} can be measured: {missing}")
    return scores


@dataclass(frozen=True, kw_only=True)
class AnswerTask(Task):
    """Questions that the unsteered model answers with `source` shall be answered with `target`.

    Scores: `effect`, `damage`; of questions of the same type that are answered otherwise than with `source`,
    `same_type_changed` (the share of other answers than before) and, but for those answered with `target` anyway,
    `same_type_to_target`; `target_accuracy` on those of the type whose right answer is the target; of all but source
    questions `kept`, the share of answers that are the same as before; `accuracy` on questions of other types.

    Attributes:
        source: An answer; None for every answer but the target.
        target: Another.
        types: The types of questions that have such answers.
    """

    source: str | None = None
    target: str
    types: Sequence[str]

    def __post_init__(self) -> None:
        _no_text(types=self.types)
        if self.source is not None and plain(self.source) == plain(self.target):
            raise BadInputError(f"source and target are both {self.target!r}; nothing would change")

    def about(self, answers: Answers) -> list[str]:
        """Whether a question is answered with the source, is of its type, or of another."""
        target = plain(self.target)
        found = []
        for kind, text in zip(self._types(answers), answers.texts[0], strict=True):
            said = plain(text)
            from_source = said != target if self.source is None else said == plain(self.source)
            found.append("other" if kind not in self.types else "source" if from_source else "same type")
        return found

    def scores(self, answers: Answers) -> Scores:
        """See the class."""
        about = self.about(answers)
        target, texts = plain(self.target), [[plain(text) for text in said] for said in answers.texts]
        source, same, other = ([one == what for one in about] for what in ("source", "same type", "other"))
        others = [one and text != target for one, text in zip(same, texts[0], strict=True)]

        def is_target(n: int) -> bool:
            return plain(str(answers.samples[n]["answer"])) == target

        accuracy = right(answers, other)
        found = {
            "effect": counted(answers, source, lambda s, n: float(texts[s][n] == target)),
            "damage": fall(accuracy),
            "same_type_changed": counted(answers, same, lambda s, n: float(texts[s][n] != texts[0][n])),
            "same_type_to_target": counted(answers, others, lambda s, n: float(texts[s][n] == target)),
            "target_accuracy": right(answers, [what != "other" and is_target(n) for n, what in enumerate(about)]),
            "kept": kept(answers, [one != "source" for one in about]),
            "accuracy": accuracy,
        }
        asked = f"question of type {', '.join(self.types)}"
        answered = f"otherwise than with {self.target!r}" if self.source is None else f"with {self.source!r}"
        missing = {
            "effect": f"the unsteered model answers no {asked} {answered}",
            "damage": f"every sample is a {asked}, or has no known answer; give questions of other types too",
        }
        return _some(found, missing)

    def describe(self) -> dict[str, Any]:
        """For people."""
        source = "any answer" if self.source is None else self.source
        return self._told(
            f"{source} → {self.target}",
            f"share of questions ({', '.join(self.types)}) answered “{source}” that become “{self.target}”",
            "fall of accuracy on questions of all other types",
        )


@dataclass(frozen=True, kw_only=True)
class StyleTask(Task):
    """Captions shall have words of one class and none of others, under a prompt that asks for neither.

    Scores: `effect`, `damage`; `wanted` and `unwanted`, the shares of captions with at least one word of these; `words`
    per caption; `kept` and `accuracy` on questions.

    Attributes:
        wanted: A class of words (`hooked_mm.word_classes`), or words.
        unwanted: Classes of words, or words.
        caption_types: Types of samples that are captions; all others are questions.
    """

    wanted: str | Sequence[str]
    unwanted: Sequence[str | Sequence[str]] = ()
    caption_types: Sequence[str] = ("caption",)

    def __post_init__(self) -> None:
        _no_text(unwanted=self.unwanted, caption_types=self.caption_types)

    def about(self, answers: Answers) -> list[str]:
        """Whether a sample is a caption or a question."""
        return ["source" if kind in self.caption_types else "other" for kind in self._types(answers)]

    def scores(self, answers: Answers) -> Scores:
        """See the class."""
        about = self.about(answers)
        captions, questions = ([one == what for one in about] for what in ("source", "other"))
        wanted, unwanted = self._words()
        has, lacks = (self._with_words(answers, captions, words) for words in (wanted, unwanted))
        accuracy = right(answers, questions)
        found = {
            "effect": has * (1 - lacks),
            "damage": fall(accuracy),
            "wanted": has,
            "unwanted": lacks,
            "words": counted(answers, captions, lambda s, n: float(len(plain(answers.texts[s][n]).split()))),
            "kept": kept(answers, questions),
            "accuracy": accuracy,
        }
        missing = {
            "effect": f"no sample is of type {', '.join(self.caption_types)}",
            "damage": "there are no questions",
        }
        return _some(found, missing)

    def _words(self) -> tuple[list[str], list[str]]:
        wanted, *unwanted = (words_of(one) if isinstance(one, str) else one for one in (self.wanted, *self.unwanted))
        return list(wanted), [word for words in unwanted for word in words]

    @staticmethod
    def _with_words(answers: Answers, captions: Sequence[bool], words: Sequence[str]) -> Float[Tensor, "s n"]:
        """1 for captions with at least one of the words, whole and in any case, 0 for others."""
        if not words:
            return counted(answers, captions, lambda s, n: 0.0)
        pattern = word_pattern(dict.fromkeys(words))
        return counted(answers, captions, lambda s, n: float(pattern.search(answers.texts[s][n]) is not None))

    def describe(self) -> dict[str, Any]:
        """For people."""
        shown = [one if isinstance(one, str) else "/".join(one) for one in (self.wanted, *self.unwanted)]
        without = f" and none of {', '.join(shown[1:])}" if self.unwanted else ""
        return self._told(
            f"captions of {shown[0]} only",
            f"share of captions with words of {shown[0]}{without}",
            "fall of accuracy on questions",
        )
