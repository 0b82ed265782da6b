"""VQAv2's accuracy against a second implementation from the official rules, and what XL-VLMs' evaluation does wrong."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from fractions import Fraction

import pytest

from hooked_mm.errors import BadInputError
from steering.vqa_accuracy import (
    CONTRACTIONS,
    VQAAccuracy,
    answer_accuracy,
    exact_match,
    normalise,
    vqa_accuracy,
)

MARKS = list(';/[]"{}()=+\\_-><@`,?!')
DIGITS = "0123456789"
OF_MATCHES = [Fraction(share, 10) for share in (0, 3, 6, 9)]
"""The accuracy of an answer that none, one, two, three of ten people gave, in closed form; 1 from four on."""


def official_text(text: str) -> str:
    """Punctuation, then numbers, articles and contractions, character by character and word by word."""
    comma = any(a in DIGITS and b == "," and c in DIGITS for a, b, c in zip(text, text[1:], text[2:], strict=False))
    gone = {mark for mark in MARKS if comma or " " + mark in text or mark + " " in text}
    spaced = ["" if letter in gone else " " if letter in MARKS else letter for letter in text]
    marked = "".join(spaced)
    kept, stops = "", 0
    for place, letter in enumerate(marked):
        if letter == "." and marked[place + 1 : place + 2] not in list(DIGITS) and stops < 32:
            stops += 1
        else:
            kept += letter
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    words = []
    for word in kept.lower().split():
        if word in ("a", "an", "the"):
            continue
        if word == "none":
            words.append("0")
        elif word in numbers:
            words.append(str(numbers.index(word)))
        else:
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def official(answer: str, answers: Sequence[str]) -> Fraction:
    """The accuracy by how many of the ten match."""
    own, *given = [" ".join(" ".join(text.split("\n")).split("\t")).strip() for text in (answer, *answers)]
    if any(item != given[0] for item in given):
        own, *given = [official_text(text) for text in (own, *given)]
    matches = given.count(own)
    return OF_MATCHES[matches] if matches < 4 else Fraction(1)


WORDS = """a an the The A none None zero one two Three ten eleven yes no Yes NO cat cats' dont don't Im im Ive whats
    somebody'd somebodyd've oclock o'clock 'ows'at ow's'at theyre let's 3 10 1,000 1,0 3.5 .5 5. u.s. U.S.A. mr. e.g
    t-shirt no-one 50% $5 #1 & ~ ^ | : 7:30 red/blue (red) "stop" what? wow! a,b a, ,b 1, ,1 2,3? café ½ ² 1,² … – '
""".split()
ENDS = ["", "", "", ".", "..", "?", "!", " ", "\n", "\t", ",", " ,", " .", ". ", "\n\n", "." * 40]


def made_answers(rng: random.Random) -> tuple[str, list[str]]:
    """An answer and ten, alike enough to match often."""
    glue = rng.choice([" ", " ", "  ", "\t", "\n", ", ", ",", "-", " - ", ""])
    stems = [glue.join(rng.choices(WORDS, k=rng.choice([1, 1, 2, 3]))) for _ in range(rng.choice([1, 1, 2, 3]))]
    if rng.random() < 0.2:
        stems.append("".join(rng.choices([*MARKS, *"aA1.,' :", " "], k=rng.randint(0, 8))))

    def varied() -> str:
        stem = rng.choice(stems)
        stem = rng.choice([str, str, str.lower, str.upper, str.title, official_text])(stem)
        return rng.choice(["", "", "", "the ", " ", "a "]) + stem + rng.choice(ENDS)

    one = varied()
    answers = [one] * 10 if rng.random() < 0.15 else [varied() for _ in range(10)]
    return rng.choice([rng.choice(answers), varied(), official_text(one)]), answers


def test_two_thousand_answer_sets_as_the_official_evaluation_scores_them() -> None:
    """Random and adversarial: punctuation, articles, numbers, contractions, ten equal answers with punctuation."""
    rng = random.Random(0)
    seen = []
    for _ in range(2000):
        answer, answers = made_answers(rng)
        expected = official(answer, answers)
        assert vqa_accuracy(answer, answers) == pytest.approx(float(expected), abs=1e-12), (answer, answers)
        seen.append((len(set(answers)) == 1, expected))
    # Every value there is has been met, with people who agree and who do not.
    assert {value for alike, value in seen if not alike} == {*OF_MATCHES, 1}
    assert {value for alike, value in seen if alike} == {0, 1}


def test_the_contractions_are_the_official_ones() -> None:
    """Number of entries, and digest of the table in the official repository."""
    lines = "\n".join(f"{word} {full}" for word, full in sorted(CONTRACTIONS.items()))
    digest = "b847028bf993545e795d0f95864b82668b85d531cc6ee3525ae719909a2d1e54"
    assert (len(CONTRACTIONS), hashlib.sha256(lines.encode()).hexdigest()) == (120, digest)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),
        ("1,000-dollars", "1000dollars"),
        ("red,blue", "red blue"),
        ("5.5 p.m.", "5.5 pm"),
        ("none", "0"),
        ("Two cats", "2 cats"),
        ("dont", "don't"),
        ("7:30", "7:30"),
        ("." * 40, "." * 8),
    ],
)
def test_normalise_by_hand(text: str, expected: str) -> None:
    """The quirks one by one, written down from the official rules."""
    assert normalise(text) == expected


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9, 11])
def test_fewer_than_ten_answers_are_refused(count: int) -> None:
    """Or more; with a word on what to do. A text is not a list of ten letters."""
    with pytest.raises(BadInputError, match=r"10 answers.*exact_match"):
        vqa_accuracy("yes", ["yes"] * count)
    with pytest.raises(BadInputError, match="10 answers"):
        vqa_accuracy("a", "strawberry")


@pytest.mark.parametrize("count", [0, 2, 3, 9, 11])
def test_references_are_one_or_ten(count: int) -> None:
    """Anything else is neither data set's."""
    with pytest.raises(BadInputError, match="one reference"):
        answer_accuracy("yes", ["yes"] * count)


def test_xl_vlms_one_answer_data_is_not_capped_at_a_third() -> None:
    """One reference put into min(matches / 3, 1) gives a perfect model 33 %."""
    metric = VQAAccuracy()
    metric.update(["red", "Two ", "no"], [["red"], ["two"], ["yes"]], ["other", "number", "yes/no"])
    assert answer_accuracy("red", ["red"]) == exact_match(" Red", "red\n") == 1
    assert {name: found.value for name, found in metric.compute().items()} == {
        "overall": pytest.approx(2 / 3),
        "number": 1,
        "other": 1,
        "yes/no": 0,
    }


def test_xl_vlms_normalisation_is_not_applied_where_all_agree() -> None:
    """Ten times "Yes.": only "Yes." is right. With one dissenter the same answers match "yes"."""
    assert vqa_accuracy("yes", ["Yes."] * 10) == 0
    assert vqa_accuracy(" Yes.\n", ["Yes."] * 10) == 1
    assert vqa_accuracy("yes", ["Yes."] * 9 + ["no"]) == 1
    assert vqa_accuracy("2", ["two"] * 10) == 0
    assert vqa_accuracy("2", ["two"] * 9 + ["3"]) == 1


def test_xl_vlms_overall_is_the_mean_of_samples_not_of_types() -> None:
    """Nine right answers of one type and one wrong of another: 90 %, not 50 %; batches of any size."""
    metric = VQAAccuracy()
    metric.update(["yes"] * 8, [["yes"]] * 8, ["yes/no"] * 8)
    metric.update(["yes", "2"], [["yes"], ["3"]], ["yes/no", "number"])
    found = metric.compute()
    assert found["overall"] == (pytest.approx(0.9), 10)
    assert (found["yes/no"], found["number"]) == ((1, 9), (0, 1))


def test_xl_vlms_whole_answers_are_compared_not_substrings() -> None:
    """ "no" is not in "none", nor "1" in "10", nor "red" in "scared"."""
    for answer, reference in (("no", "none"), ("1", "10"), ("red", "scared")):
        assert exact_match(answer, reference) == exact_match(reference, answer) == 0
        assert vqa_accuracy(answer, [reference] * 9 + ["x"]) == vqa_accuracy(reference, [answer] * 9 + ["x"]) == 0


def test_metric_without_types_or_samples() -> None:
    """The overall alone; NaN of nothing; a reset forgets."""
    metric = VQAAccuracy()
    metric.update(["cat", "dog"], [["cat"] * 10, ["cat"] * 2 + ["dog"] * 8])
    assert metric.compute() == {"overall": (1, 2)}
    metric.reset()
    metric.update([], [])
    (found,) = metric.compute().values()
    assert (math.isnan(found.value), found.samples) == (True, 0)


def test_metric_refuses_what_does_not_belong_together() -> None:
    """Lengths that differ, a text for a list, a type with the name of all."""
    metric = VQAAccuracy()
    with pytest.raises(BadInputError, match="2 answers, 1 references"):
        metric.update(["a", "b"], [["a"]])
    with pytest.raises(BadInputError, match="1 answers, 1 references, 0 types"):
        metric.update(["a"], [["a"]], [])
    with pytest.raises(BadInputError, match="one text"):
        metric.update("a", [["a"]])
    with pytest.raises(BadInputError, match="overall"):
        metric.update(["a"], [["a"]], ["overall"])
