"""MMVP's protocol: pairs of pictures, one question, opposite answers; a pair is right only if both answers are.

Tong et al. 2024 (arXiv 2401.06209). Question 2k + 1 and 2k + 2 are a pair. The prompt is the question and the options,
`(a) .. (b) ..`, and an answer is graded in one of three ways:

| grade | the answer is |
|---|---|
| `letters` | the letter whose tokens are likelier as the answer: sum of log p("(a)") against that of log p("(b)") |
| `options` | the option whose own words are likelier as the answer, for models that can't say letters |
| `parsed` | the letter that a generated text gives as its answer; a text without one is counted, not guessed |

A model that guesses is right about half of the questions and a quarter of the pairs; one that does not look, about half
and none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float64

from analyses.model_samples import Samples
from analyses.targets import answer_targets
from analyses.token_ablation import scores_of
from hooked_mm.batch import Batch
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.datasets.templates import fill
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import Interval, bootstrap
from hooked_mm.loading import OnError
from hooked_mm.prepare import SampleImages
from hooked_mm.runner import HookSpec

Grade = Literal["letters", "options", "parsed"]
Ask = Literal["question and options", "question"]
LABEL_ERRORS = {99: "b", 100: "a", 279: "b", 280: "a"}
"""Questions whose published answers are known to be swapped, with the right ones; put right only if asked."""

_LETTER = re.compile(r"\(\s*([a-z])\s*\)", re.IGNORECASE)
# Also a), as answers have it; not the end of a word in parentheses.
_NAMED = re.compile(r"(?<![a-z0-9])([a-z])\s*\)", re.IGNORECASE)
_LEAD = (
    r"(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)\b\s*(?:is)?\s*:?\s*(?:option\s+)?"
)
_ANSWERS = (
    # (a), a) and what follows.
    rf"^(?:{_LEAD})?\(?\s*([a-z])\s*\)",
    # A. or a: before the option's words.
    rf"^(?:{_LEAD})?([a-z])\s*[.:](?=\s|$)",
    # A letter and nothing else.
    rf"^(?:{_LEAD})?([a-z])$",
    # In a sentence only with its parentheses.
    rf"\b{_LEAD}\(\s*([a-z])\s*\)",
)
_SAID = tuple(re.compile(pattern, re.IGNORECASE) for pattern in _ANSWERS)


@dataclass(frozen=True)
class Question:
    """One question of the benchmark.

    Attributes:
        index: Its number, from 1 on.
        pair: The number of its pair, from 1 on.
        text: The question alone.
        offered: The options as they are written.
        options: Letter -> words, in the order in which they are offered.
        answer: The right letter.
        images: Its picture.
        template: What wraps the prompt; None for nothing.
    """

    index: int
    pair: int
    text: str
    offered: str
    options: Mapping[str, str]
    answer: str
    images: SampleImages
    template: str | None = None

    def prompt(self, ask: Ask) -> str:
        """Question + " " + options, as they stand in the benchmark; or the question alone."""
        return fill(self.template, self.text if ask == "question" else f"{self.text} {self.offered}")


class Graded(NamedTuple):
    """What a model said to a question.

    Attributes:
        question: It.
        said: The letter; None if the text says none, or two options are equally likely.
        scores: Letter -> sum of log-probabilities; empty where a text was parsed.
        text: What was generated; empty where options were scored.
    """

    question: Question
    said: str | None
    scores: Mapping[str, float]
    text: str = ""

    @property
    def right(self) -> bool:
        """Whether that is the answer."""
        return self.said == self.question.answer


def read_options(text: str) -> dict[str, str]:
    """Letter -> words of `(a) .. (b) ..`, in the order in which they are written, whichever letter comes first.

    Raises:
        BadInputError: If there are not two letters at least, one comes twice, or one has no words.
    """
    marks = list(_LETTER.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    found = {mark[1].lower(): text[mark.end() : end].strip(" ,;") for mark, end in zip(marks, ends, strict=False)}
    if len(found) < 2 or len(found) < len(marks) or not all(found.values()) or text[: marks[0].start()].strip():
        raise BadInputError(f"the options are {text!r}; they must be like '(a) Yes (b) No'; repair the table")
    return found


def read_answer(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a text gives as its answer; None if it gives none, or speaks of several.

    `(a)`, `a)`, `A.`, `The answer is (b)` and an option's own words give one; `It is a cat` does not.

    Args:
        text: What a model generated.
        options: Letter -> words.
    """
    said = re.sub(r"[*_`\"'“”]", "", text).strip()
    letters = {mark.lower() for mark in _NAMED.findall(said)}
    if len(letters & set(options)) > 1:
        return None
    bare = said.rstrip(" .!").lower()
    same = [letter for letter, words in options.items() if words.rstrip(" .!").lower() == bare]
    if len(same) == 1:
        return same[0]
    found = next((match[1].lower() for pattern in _SAID if (match := pattern.search(said))), None)
    return found if found in options else None


def questions_of(data: SampleDataModule, *, fix_labels: bool = False) -> list[Question]:
    """The questions of `hooked_mm.datasets.Mmvp`.

    Args:
        data: The data module.
        fix_labels: Put the known errors of the published labels right (`LABEL_ERRORS`).

    Raises:
        BadInputError: If options can't be read, or an answer is none of them.
    """
    found = []
    for number in range(len(data.dataset)):  # type: ignore[arg-type]
        sample: Sample = data.dataset[number]
        index, written = int(sample.columns["index"]), str(sample.columns["options"])
        options = read_options(written)
        answer = (sample.answer or "").strip().strip("()").lower()
        if answer not in options:
            raise BadInputError(f"question {index} has the answer {sample.answer!r}, which is none of {written!r}")
        if fix_labels:
            answer = LABEL_ERRORS.get(index, answer)
        text = str(sample.columns["question"]).removesuffix(written).strip()
        template = getattr(data.dataset, "template", None)
        pair = int(sample.columns["pair"])
        found.append(Question(index, pair, text, written, options, answer, sample.images, template))
    return found


Hooks = Callable[[Sequence[Sample], Batch], Sequence[HookSpec]]
"""What to change in a pass, given its samples (id `index`, or `index-letter`) and batch."""


def unchanged(samples: Sequence[Sample], batch: Batch) -> Sequence[HookSpec]:
    """No change."""
    return ()


def option_scores(
    model: HookedMM,
    questions: Sequence[Question],
    *,
    grade: Grade = "letters",
    ask: Ask = "question and options",
    hooks: Hooks = unchanged,
    batch_size: int = 32,
    on_error: OnError = "skip",
) -> tuple[list[Graded], list[str]]:
    """Which option each question's answer is likelier to be: teacher-forced, all options of a batch in one pass.

    Args:
        model: The model.
        questions: To be asked; two with one index are not told apart.
        grade: `letters` or `options`.
        ask: What the prompt is.
        hooks: To run under.
        batch_size: Answers in one pass.
        on_error: Whether a question whose picture is bad is listed and left out, or ends the run.

    Returns:
        The graded questions in their order, and reasons of those left out.

    Raises:
        BadInputError: If the tokenizer does not know an answer, or two answers of a question are the same to it.
    """
    answers = {
        (question.index, letter): f"({letter})" if grade == "letters" else words
        for question in questions
        for letter, words in question.options.items()
    }
    for question in questions:
        _check_tokens(model, question.index, {x: answers[question.index, x] for x in question.options}, grade)
    asked = [
        Sample(f"{question.index}-{letter}", question.images, question.prompt(ask), answers[question.index, letter])
        for question in questions
        for letter in question.options
    ]
    samples = Samples(model, SampleDataModule(asked, batch_size), "given", on_error=on_error)
    scores: dict[str, float] = {}
    for part, batch in samples:
        targets = answer_targets(batch)
        each = scores_of(model, batch, targets, hooks(part, batch), "log_prob")
        sums = torch.zeros(len(part), dtype=torch.float64).index_add_(0, targets.sample.cpu(), each)
        scores |= dict(zip((sample.id for sample in part), sums.tolist(), strict=True))
    graded = []
    for question in questions:
        own = {x: scores[f"{question.index}-{x}"] for x in question.options if f"{question.index}-{x}" in scores}
        if len(own) == len(question.options):
            best = [letter for letter, score in own.items() if score == max(own.values())]
            graded.append(Graded(question, best[0] if len(best) == 1 else None, own))
    return graded, samples.skipped


def _check_tokens(model: HookedMM, index: int, answers: Mapping[str, str], grade: Grade) -> None:
    """Refuse answers that the tokenizer takes for one another, or does not know."""
    tokenizer = model.tokenizer
    ids = {letter: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for letter, text in answers.items()}
    unknown = [
        letter for letter, own in ids.items() if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in own
    ]
    if unknown or len(set(ids.values())) < len(ids):
        what = f"does not know all of {answers[unknown[0]]!r}" if unknown else "takes them for the same"
        other = (
            "the options' own words (grade='options')" if grade == "letters" else "a generated text (grade='parsed')"
        )
        raise BadInputError(
            f"question {index} has the answers {', '.join(map(repr, answers.values()))}, but the tokenizer {what}: "
            f"their probabilities can't be told apart; grade by {other}"
        )


def parsed_answers(
    model: HookedMM,
    questions: Sequence[Question],
    *,
    ask: Ask = "question and options",
    max_new_tokens: int = 20,
    hooks: Hooks = unchanged,
    batch_size: int = 32,
    on_error: OnError = "skip",
) -> tuple[list[Graded], list[str]]:
    """What a model generates, and the letter that it gives.

    Args:
        model: The model.
        questions: To be asked.
        ask: What the prompt is.
        max_new_tokens: Of an answer.
        hooks: To run under.
        batch_size: Questions at a time.
        on_error: As in `option_scores`.

    Returns:
        The graded questions in their order, and reasons of those left out.
    """
    asked = [Sample(str(question.index), question.images, question.prompt(ask)) for question in questions]
    samples = Samples(model, SampleDataModule(asked, batch_size), "none", on_error=on_error)
    texts: dict[str, str] = {}
    for part, batch in samples:
        with model.hooks(hooks(part, batch)):
            made = model.generate(batch, max_new_tokens).text
        texts |= dict(zip((sample.id for sample in part), made, strict=True))
    graded = [
        Graded(question, read_answer(texts[str(question.index)], question.options), {}, texts[str(question.index)])
        for question in questions
        if str(question.index) in texts
    ]
    return graded, samples.skipped


def graded_questions(
    model: HookedMM, questions: Sequence[Question], grade: Grade, *, max_new_tokens: int = 20, **options: object
) -> tuple[list[Graded], list[str]]:
    """As `option_scores` or `parsed_answers`, by the way of grading."""
    if grade == "parsed":
        return parsed_answers(model, questions, max_new_tokens=max_new_tokens, **options)  # type: ignore[arg-type]
    return option_scores(model, questions, grade=grade, **options)  # type: ignore[arg-type]


class PairScores(NamedTuple):
    """Right answers by question and by pair.

    Attributes:
        pairs: Which pairs are right: both answers.
        singles: Per pair, how many of its two answers are right, as a share.
        alike: Which pairs got the same letter twice: the answer does not depend on the picture.
        left_out: Questions whose pair is not whole, because the other one could not be asked.
    """

    pairs: Bool[torch.Tensor, " m"]
    singles: Float64[torch.Tensor, " m"]
    alike: Bool[torch.Tensor, " m"]
    left_out: int

    def interval(self, which: str, draws: int = 1000, seed: int = 0) -> Interval:
        """The share of `pairs`, `singles` or `alike`, with its bootstrap interval over pairs."""
        return bootstrap(getattr(self, which).double(), draws=draws, seed=seed)

    def told(self) -> str:
        """As the protocol reports it: pairs right of all, answers right of all."""
        whole = len(self.pairs)
        return (
            f"{int(self.pairs.sum())} of {whole} pairs, {round(2 * float(self.singles.sum()))} of {2 * whole} answers"
        )


def pair_scores(graded: Sequence[Graded]) -> PairScores:
    """Right answers by pair.

    Args:
        graded: Questions in any order.

    Raises:
        BadInputError: If no pair is whole, or a question was graded twice.
    """
    by_pair: dict[int, dict[int, Graded]] = {}
    for one in graded:
        own = by_pair.setdefault(one.question.pair, {})
        if one.question.index in own:
            raise BadInputError(f"question {one.question.index} was graded twice; grade each once")
        own[one.question.index] = one
    whole = [list(own.values()) for _, own in sorted(by_pair.items()) if len(own) == 2]
    if not whole:
        raise BadInputError(f"no pair is whole among {len(graded)} graded questions; both of a pair must be asked")
    right = torch.tensor([[one.right for one in own] for own in whole])
    alike = torch.tensor([own[0].said == own[1].said and own[0].said is not None for own in whole])
    return PairScores(right.all(1), right.double().mean(1), alike, len(graded) - 2 * len(whole))


def with_other_pictures(questions: Sequence[Question]) -> list[Question]:
    """The same questions, each with the picture of the other one of its pair.

    Raises:
        BadInputError: If a pair is not whole.
    """
    by_index = {question.index: question for question in questions}
    other = {index: index + 1 if index % 2 else index - 1 for index in by_index}
    missing = next((index for index, partner in other.items() if partner not in by_index), None)
    if missing is not None:
        raise BadInputError(f"question {missing} is asked without {other[missing]}, the other one of its pair")
    return [replace(question, images=by_index[other[question.index]].images) for question in questions]
