"""MMVP's protocol: prompts, answers and pairs, against counts by hand and log-probabilities summed one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from analyses.mmvp_protocol import (
    LABEL_ERRORS,
    Graded,
    Question,
    option_scores,
    pair_scores,
    parsed_answers,
    questions_of,
    read_answer,
    read_options,
    with_other_pictures,
)
from hooked_mm.datasets.mmvp import Mmvp
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from tests.mmvp_files import colour_of, write_mmvp
from tests.processors import processor
from tests.tiny import tiny

BOTH = {"a": "Open", "b": "Closed"}


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    """Three pairs."""
    return questions_of(Mmvp(write_mmvp(tmp_path / "mmvp")))


def test_the_prompt_is_question_and_options_as_they_stand(questions: list[Question], tmp_path: Path) -> None:
    """Commas and quotes undone; the second letter may come first; a template goes around."""
    assert [question.index for question in questions] == [1, 2, 9, 10, 99, 100]
    assert [question.pair for question in questions] == [1, 1, 5, 5, 50, 50]
    assert questions[0].prompt("question and options") == "Is the wing open, or not? (a) Open (b) Closed"
    assert questions[2].prompt("question and options") == 'Is "Z" pressed? (b) No (a) Yes'
    assert questions[2].prompt("question") == 'Is "Z" pressed?'
    assert questions[2].options == {"b": "No", "a": "Yes"}
    assert [question.answer for question in questions] == ["a", "b", "b", "a", "a", "b"]
    wrapped = questions_of(Mmvp(tmp_path / "mmvp", template="llava-choice"))
    assert wrapped[0].prompt("question").startswith("Is the wing open, or not?\nAnswer with")


def test_pictures_are_those_of_their_numbers_not_of_their_place_in_a_listing(questions: list[Question]) -> None:
    """100.jpg lies before 99.jpg, 10.jpg before 9.jpg; the pair's other picture is that of the neighbour's number."""
    other = with_other_pictures(questions)
    for question, swapped in zip(questions, other, strict=True):
        partner = question.index + 1 if question.index % 2 else question.index - 1
        for made, number in ((question, question.index), (swapped, partner)):
            shown = np.asarray(Image.open(str(made.images)).convert("RGB"))[12, 12]
            assert np.abs(shown.astype(int) - colour_of(number)).max() < 6
        assert (swapped.index, swapped.answer) == (question.index, question.answer)
    with pytest.raises(BadInputError, match="question 9 is asked without 10"):
        with_other_pictures(questions[:3])


def test_known_label_errors_are_put_right_only_when_asked(tmp_path: Path) -> None:
    """99 and 100, 279 and 280."""
    rows = {number: ("Is it?", "(a) Yes (b) No", "(a)" if number % 2 else "(b)") for number in (99, 100, 279, 280)}
    data = Mmvp(write_mmvp(tmp_path / "mmvp", rows, pictures=False))
    assert [question.answer for question in questions_of(data)] == ["a", "b", "a", "b"]
    assert [question.answer for question in questions_of(data, fix_labels=True)] == ["b", "a", "b", "a"]
    assert LABEL_ERRORS == {99: "b", 100: "a", 279: "b", 280: "a"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(a)", "a"),
        (" (B) ", "b"),
        ("a)", "a"),
        ("A.", "a"),
        ("b", "b"),
        ("**(b)** Closed", "b"),
        ("(a) Open.", "a"),
        ("A. Open", "a"),
        ("b: Closed", "b"),
        ("The answer is (b)", "b"),
        ("The correct answer is: B.", "b"),
        ("Answer: a", "a"),
        ("Option B", "b"),
        ("The wings are spread wide, so the answer is (a).", "a"),
        ("Closed", "b"),
        ('"open".', "a"),
        ("A butterfly is open", None),
        ("The answer is a butterfly", None),
        ("(a) or (b)", None),
        ("a) or b)", None),
        ("(a) Open (both)", "a"),
        ("(c)", None),
        ("not (a)", None),
        ("I think so.", None),
        ("be open", None),
        ("", None),
    ],
)
def test_what_counts_as_an_answer(text: str, letter: str | None) -> None:
    """Anchored: a letter that is given as the answer, or the option's very words."""
    assert read_answer(text, BOTH) == letter


def test_it_is_a_cat_is_not_answer_a() -> None:
    """Nor is any other sentence with the word."""
    for text in (
        "It is a cat",
        "It is a cat.",
        "a cat",
        "A cat is sitting there",
        "This is a dog (b",
        "It has a B side",
    ):
        assert read_answer(text, {"a": "Cat", "b": "Dog"}) is None


def test_options_are_read_in_any_order() -> None:
    """And refused where they are not options."""
    assert list(read_options("(b) Two words,  (a) 3").items()) == [("b", "Two words"), ("a", "3")]
    for wrong in ("Yes or no", "(a) Yes", "(a) Yes (a) No", "(a) (b) No", "either (a) Yes (b) No"):
        with pytest.raises(BadInputError, match="must be like"):
            read_options(wrong)


def graded(said: dict[int, str | None]) -> list[Graded]:
    """Answers to questions whose right answers are a (odd) and b (even)."""
    return [
        Graded(Question(n, (n + 1) // 2, "?", "(a) Yes (b) No", BOTH, "ab"[1 - n % 2], None), letter, {})
        for n, letter in said.items()
    ]


def test_a_pair_is_right_only_if_both_are() -> None:
    """Counted by hand: (right, right), (right, wrong), (wrong, wrong), (right, unparsed), one of a pair alone."""
    said: dict[int, str | None] = {9: "a", 10: "b", 1: "a", 2: "a", 99: "b", 100: "a", 5: "a", 6: None, 7: "a"}
    found = pair_scores(graded(said))
    assert found.pairs.tolist() == [False, False, True, False]
    assert found.singles.tolist() == [0.5, 0.5, 1.0, 0.0]
    assert found.alike.tolist() == [True, False, False, False]
    assert found.left_out == 1
    assert found.told() == "1 of 4 pairs, 4 of 8 answers"
    assert float(found.interval("singles").estimate) == 0.5
    low, high = (float(end) for end in found.interval("pairs")[1:])
    assert 0 <= low <= 0.25 <= high <= 1
    with pytest.raises(BadInputError, match="no pair is whole"):
        pair_scores(graded({1: "a", 4: "b"}))
    with pytest.raises(BadInputError, match="question 1 was graded twice"):
        pair_scores(graded({1: "a", 2: "b"}) + graded({1: "a"}))


def scripted(model: HookedMM, words: dict[int, str]) -> Callable[..., Any]:
    """Hooks that make the model say a word to each question, whatever it sees."""

    def hooks(samples: Sequence[Any], batch: Any) -> list[Any]:
        ids = [model.tokenizer(words[int(one.id.split("-")[0])])["input_ids"][-1] for one in samples]

        def say(value: Tensor, hook: Any) -> Tensor:
            changed = torch.zeros_like(value)
            changed[torch.arange(len(ids)), :, ids] = 9
            return changed

        return [("hook_logits", say)]

    return hooks


@pytest.fixture
def colours(tmp_path: Path) -> list[Question]:
    """Questions that the small models have words for."""
    rows = {
        number: ("what colour is the star ?", "(b) blue (a) red", "(a)" if number % 2 else "(b)")
        for number in (1, 2, 9, 10, 99, 100)
    }
    return questions_of(Mmvp(write_mmvp(tmp_path / "colours", rows)))


def test_a_scripted_model_has_the_counts_of_its_script(llava: HookedMM, colours: list[Question]) -> None:
    """Right about pair 5 alone, and about one of pair 1; batches cut through pairs and options."""
    script = {1: "red", 2: "red", 9: "red", 10: "blue", 99: "blue", 100: "red"}
    answers, skipped = option_scores(
        llava, colours, grade="options", ask="question", hooks=scripted(llava, script), batch_size=5
    )
    assert [one.said for one in answers] == ["a", "a", "a", "b", "b", "a"]
    assert pair_scores(answers).told() == "1 of 3 pairs, 3 of 6 answers"
    assert not skipped
    said, _ = parsed_answers(
        llava, colours, ask="question", max_new_tokens=1, hooks=scripted(llava, {**script, 10: "star"})
    )
    assert [one.said for one in said] == ["a", "a", "a", None, "b", "a"]
    assert pair_scores(said).told() == "0 of 3 pairs, 2 of 6 answers"


def test_letters_that_the_tokenizer_does_not_know_are_refused(llava: HookedMM, colours: list[Question]) -> None:
    """The small models have no brackets: '(a)' and '(b)' would be compared as unknown tokens."""
    with pytest.raises(BadInputError, match=r"does not know all of '\(b\)'.*grade='options'"):
        option_scores(llava, colours)
    same = [replace(colours[0], options={"a": "red", "b": " red"})]
    with pytest.raises(BadInputError, match="takes them for the same"):
        option_scores(llava, same, grade="options")


def test_a_question_whose_picture_is_bad_is_counted_not_guessed(llava: HookedMM, colours: list[Question]) -> None:
    """Listed once per option, and its pair left out."""
    Path(str(colours[3].images)).write_bytes(b"no picture")
    answers, skipped = option_scores(llava, colours, grade="options", ask="question")
    assert [one.question.index for one in answers] == [1, 2, 9, 99, 100]
    assert len(skipped) == 2
    assert pair_scores(answers).left_out == 1


def test_an_answer_is_the_likelier_letter_token_by_token(questions: list[Question]) -> None:
    """The whole path with letters, on a miniature of random weights: each answer's tokens one after the other."""
    model = HookedMM(tiny("llava"), processor("llava"), check=False)
    answers, _ = option_scores(model, questions, batch_size=7)
    for one in answers:
        picture = Image.open(str(one.question.images)).convert("RGB")
        prompt = one.question.prompt("question and options")
        sums = {}
        for letter in "ab":
            batch = model.prepare(picture, prompt, answers=[f"({letter})"])
            said = batch.input_ids[0][batch.mask(role="answer")[0]]
            assert model.tokenizer.decode(said).strip() == f"({letter})"
            logits = model.run_with_hooks(batch)
            assert logits is not None
            rows = logits[0].double().log_softmax(-1)[-len(said) - 1 : -1]
            sums[letter] = float(sum(row[token] for row, token in zip(rows, said, strict=True)))
        assert one.scores == pytest.approx(sums, abs=1e-4)
        assert one.said == max(sums, key=lambda letter: sums[letter])
    assert len(pair_scores(answers).pairs) == 3


def test_a_tie_is_no_answer(llava: HookedMM, colours: list[Question]) -> None:
    """Two options that are equally likely."""

    def flat(samples: Any, batch: Any) -> list[Any]:
        return [("hook_logits", lambda value, hook: 0 * value)]

    answers, _ = option_scores(llava, colours[:2], grade="options", ask="question", hooks=flat)
    assert [one.said for one in answers] == [None, None]


def test_an_answer_that_is_no_option_is_refused(tmp_path: Path) -> None:
    """It names the question."""
    rows = {1: ("Is it?", "(a) Yes (b) No", "(c)"), 2: ("Is it?", "(a) Yes (b) No", "(a)")}
    with pytest.raises(BadInputError, match=r"question 1 has the answer '\(c\)'"):
        questions_of(Mmvp(write_mmvp(tmp_path / "mmvp", rows, pictures=False)))
