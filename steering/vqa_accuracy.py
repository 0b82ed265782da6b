"""VQAv2's official accuracy, and exact match for data with one answer per question.

VQAv2 has ten answers per question. The accuracy of an answer is the mean, over the ten subsets that leave one of them
out, of min(matches in the subset / 3, 1): 0, .3, .6, .9 for none to three matches, 1 from four on.

What the official evaluation does (github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, commit
a013f00; the task's rules in Antol et al. 2015, arXiv 1505.00468), quirks included:

- Newlines and tabs become spaces and the ends are stripped, always.
- The rest (`normalise`) happens **only where the ten answers are not all equal**. Where all ten are "Yes.", the answer
  "yes" is wrong, and "Yes." is right.
- A punctuation mark that stands beside a space somewhere in the text is removed everywhere in it, any other becomes a
  space; with a comma between two digits anywhere, all marks are removed. Apostrophes and colons are no such marks.
- Full stops that no digit follows are removed: the first 32 of them.
- Then, in lower case: number words become digits ("none" is "0"), articles go, and known words get their apostrophe.

One reference is not ten: by the formula a right answer would get 1/3 at most. Such data is scored by `exact_match`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from hooked_mm.errors import BadInputError
from steering.answer_counts import plain
from steering.gathered import RecordMetric, check_lengths

ANSWERS = 10
"""Answers per question in VQAv2."""
OVERALL = "overall"

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?![0-9])")
PERIODS_REMOVED = 32
"""The official code passes a flag, whose value is 32, where the number of replacements is expected."""
COMMA_BETWEEN_DIGITS = re.compile(r"[0-9],[0-9]")
NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
CONTRACTIONS = dict(
    pair.split("=")
    for pair in """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
    couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
    hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd
    howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd itd've=it'd've
    it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't mightnt've=mightn't've
    mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've
    oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't
    shed've=she'd've she'dve=she'd've she's=she's shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've
    shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've somebody'dve=somebody'd've
    somebodyll=somebody'll somebodys=somebody's someoned=someone'd someoned've=someone'd've
    someone'dve=someone'd've someonell=someone'll someones=someone's somethingd=something'd
    somethingd've=something'd've something'dve=something'd've somethingll=something'll thats=that's
    thered=there'd thered've=there'd've there'dve=there'd've therere=there're theres=there's theyd=they'd
    theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't
    wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're whats=what's
    whatve=what've whens=when's whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've
    who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't
    wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll
    y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
    you'dve=you'd've youll=you'll youre=you're youve=you've
    """.split()
)
"""The official table as it is: four keys in capitals are never met, and "somebody'd" loses its apostrophe."""


class Accuracy(NamedTuple):
    """A mean accuracy in 0 to 1, and of how many samples; NaN of none."""

    value: float
    samples: int


def stripped(answer: str) -> str:
    """The part of the official processing that is always done."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise(answer: str) -> str:
    """An answer as the official evaluation compares it where people disagree; see the module."""
    text = stripped(answer)
    removed = COMMA_BETWEEN_DIGITS.search(text) is not None
    plain = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if removed or beside_space else " ")
    plain = PERIOD.sub("", plain, count=PERIODS_REMOVED)
    digits = (NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in digits if word not in ARTICLES)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """The official accuracy of an answer.

    Args:
        answer: The model's.
        answers: The ten that people gave.

    Returns:
        The mean over the ten leave-one-out subsets of min(matches / 3, 1).

    Raises:
        BadInputError: If there are not ten answers.
    """
    if isinstance(answers, str) or len(answers) != ANSWERS:
        raise BadInputError(
            f"answers={answers!r}: VQAv2's accuracy is defined for {ANSWERS} answers per question; data with one "
            "answer is scored by exact_match"
        )
    given, own = [stripped(item) for item in answers], stripped(answer)
    if len(set(given)) > 1:
        given, own = [normalise(item) for item in given], normalise(own)
    matches = [item == own for item in given]
    return sum(min((sum(matches) - left_out) / 3, 1) for left_out in matches) / ANSWERS


def exact_match(answer: str, reference: str) -> float:
    """1 if the answer is the reference, but for case, white space at the ends and a full stop there, else 0."""
    return float(plain(answer) == plain(reference))


def answer_accuracy(answer: str, references: Sequence[str]) -> float:
    """`exact_match` with one reference, `vqa_accuracy` with ten.

    Raises:
        BadInputError: If there is another number of them.
    """
    if isinstance(references, str) or len(references) not in (1, ANSWERS):
        raise BadInputError(
            f"references={references!r}: an answer is scored with one reference (exact match) or {ANSWERS} (VQAv2's "
            "accuracy); give a list of so many"
        )
    return exact_match(answer, references[0]) if len(references) == 1 else vqa_accuracy(answer, references)


class VQAAccuracy(RecordMetric):
    """`answer_accuracy` per answer type and overall; the overall is the mean of samples, not of types."""

    def update(
        self, answers: Sequence[str], references: Sequence[Sequence[str]], types: Sequence[str] | None = None
    ) -> None:
        """Add samples.

        Args:
            answers: The model's.
            references: One or ten per answer.
            types: The answers' types ("yes/no", "number", "other"); None to ask for the overall only.

        Raises:
            BadInputError: If the lists differ in length, references are neither one nor ten, or a type is "overall".
        """
        check_lengths(answers=answers, references=references, types=types)
        if OVERALL in (types or ()):
            raise BadInputError(f"an answer type is called {OVERALL!r}, which is the name of all types; rename it")
        scores = [answer_accuracy(*pair) for pair in zip(answers, references, strict=True)]
        names = [None] * len(scores) if types is None else types
        self.keep(zip(scores, names, strict=True))

    def compute(self) -> dict[str, Accuracy]:
        """The accuracy under "overall" and under each type, in the order of their names."""
        by_type: dict[str, list[float]] = {}
        records: list[list[Any]] = self.records()
        for score, name in records:
            by_type.setdefault(OVERALL, []).append(score)
            if name is not None:
                by_type.setdefault(name, []).append(score)
        names = [OVERALL, *sorted(by_type.keys() - {OVERALL})]
        return {name: mean_of(by_type.get(name, [])) for name in names}


def mean_of(scores: Sequence[float]) -> Accuracy:
    """The mean of scores, and how many there are."""
    return Accuracy(sum(scores) / len(scores) if scores else float("nan"), len(scores))
