"""Tasks: scores against slow counting of made-up answers, and the faults that XL-VLMs' counting has."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from hooked_mm.word_classes import words_of
from steering.steered_answers import Answers
from steering.tasks import AnswerTask, Goal, StyleTask, Task

NAN = math.nan


def made_up(texts: list[list[str]], types: list[str], references: list[Any], column: str = "question_type") -> Answers:
    """Answers, the unsteered model's first; a reference is one answer, ten, or None."""
    samples = [
        {
            "sample": f"s{number}",
            column: kind,
            "answer": None if isinstance(known, list) else known,
            "answers": known if isinstance(known, list) else None,
        }
        for number, (kind, known) in enumerate(zip(types, references, strict=True))
    ]
    return Answers(samples, texts)


def same(found: torch.Tensor, expected: list[list[float]]) -> bool:
    """Equal, NaN where NaN is expected."""
    return torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, equal_nan=True)


SAID = ("no", "none", "not", "No.", " no ", "yes", "Yes", "red", "blue", "snow", "")
TEN = st.lists(st.sampled_from(["red", "blue", "yes", "no", "snow"]), min_size=10, max_size=10).filter(
    lambda given: len(set(given)) > 1
)


@st.composite
def drawn(draw: st.DrawFn) -> Answers:
    """Two to four settings, up to nine samples of three types, one reference or ten or none."""
    count, rows = draw(st.integers(1, 9)), draw(st.integers(2, 4))
    texts = [draw(st.lists(st.sampled_from(SAID), min_size=count, max_size=count)) for _ in range(rows)]
    types = draw(st.lists(st.sampled_from(["presence", "presence of", "colour"]), min_size=count, max_size=count))
    references = [draw(st.sampled_from(["no", "red", "yes", None]) | TEN) for _ in range(count)]
    return made_up(texts, types, references)


def bare(text: str) -> str:
    """An answer in small letters, without what stands around it."""
    found = re.fullmatch(r"\s*(.*?)\.?\s*", text)
    assert found is not None
    return found[1].strip().casefold()


def accuracy_by_hand(text: str, sample: dict[str, Any]) -> float:
    """The table of VQAv2's accuracy, or equality."""
    said = text.strip().casefold()
    if sample["answers"] is None:
        return float(bare(said) == bare(sample["answer"]))
    # The official evaluation takes full stops away, and "none" for 0, where people disagree.
    return (0.0, 0.3, 0.6, 0.9, 1.0)[min(4, sample["answers"].count(said.removesuffix(".")))]


@settings(max_examples=150)
@given(answers=drawn(), source=st.sampled_from(["no", "No.", "yes", None]))
def test_answer_scores_are_those_of_slow_counting(answers: Answers, source: str | None) -> None:
    """Sample by sample: who counts, what became of it; refused where nobody is left to count."""
    task = AnswerTask(source=source, target="red", types=["presence"])
    expected: dict[str, list[list[float]]] = {
        name: []
        for name in (
            "effect",
            "damage",
            "same_type_changed",
            "same_type_to_target",
            "target_accuracy",
            "kept",
            "accuracy",
        )
    }
    about = []
    for place, said in enumerate(answers.texts):
        rows: dict[str, list[float]] = {name: [] for name in expected}
        for number, sample in enumerate(answers.samples):
            first = bare(answers.texts[0][number])
            asked = sample["question_type"] == "presence"
            is_source = asked and (first != "red" if source is None else first == bare(source))
            is_same = asked and not is_source
            known = not asked and (sample["answer"] is not None or sample["answers"] is not None)
            now = bare(said[number])
            rows["effect"].append(float(now == "red") if is_source else NAN)
            rows["same_type_changed"].append(float(now != first) if is_same else NAN)
            rows["same_type_to_target"].append(float(now == "red") if is_same and first != "red" else NAN)
            to_target = asked and sample["answer"] is not None and bare(sample["answer"]) == "red"
            rows["target_accuracy"].append(accuracy_by_hand(said[number], sample) if to_target else NAN)
            rows["kept"].append(NAN if is_source else float(said[number] == answers.texts[0][number]))
            own = accuracy_by_hand(said[number], sample) if known else NAN
            rows["accuracy"].append(own)
            rows["damage"].append(accuracy_by_hand(answers.texts[0][number], sample) - own if known else NAN)
            if not place:
                about.append("source" if is_source else "same type" if is_same else "other")
        for name, values in rows.items():
            expected[name].append(values)
    assert task.about(answers) == about
    for name, what in (("effect", "no effect"), ("damage", "no damage")):
        if all(math.isnan(value) for value in expected[name][0]):
            with pytest.raises(BadInputError, match=what):
                task.scores(answers)
            return
    found = task.scores(answers)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert same(found[name], values), name
    assert found["effect"][0].nansum() == 0
    assert found["damage"][0].nansum() == 0


def test_xl_vlms_fault_counts_by_substring() -> None:
    """ "no" is neither in "none" nor in "not" nor in "snow"; a type is not its beginning."""
    texts = [["no", "none", "not", "snow", "no", "no"], ["yes", "yes", "yes", "yes", "yesterday", "no"]]
    types = ["presence"] * 5 + ["pres"]
    found = AnswerTask(source="no", target="yes", types=["presence"]).scores(made_up(texts, types, ["no"] * 6))
    assert same(found["effect"][1:], [[1, NAN, NAN, NAN, 0, NAN]])
    assert same(found["same_type_to_target"][1:], [[NAN, 1, 1, 1, NAN, NAN]])
    assert same(found["damage"][1:], [[NAN] * 5 + [0]])
    with pytest.raises(BadInputError, match=r"write \['presence'\]"):
        AnswerTask(source="no", target="yes", types="presence")


def test_xl_vlms_fault_accuracy_over_a_wrong_denominator() -> None:
    """One reference is matched or not, no third of it; averages are over samples, not over types."""
    texts = [["no", "red", "red", "red", "circle"], ["yes", "red", "red", "blue", "square"]]
    types = ["presence", "colour", "colour", "colour", "shape"]
    answers = made_up(texts, types, ["no", "red", "red", "red", "circle"])
    found = AnswerTask(source="no", target="yes", types=["presence"]).scores(answers)
    assert same(found["accuracy"], [[NAN, 1, 1, 1, 1], [NAN, 1, 1, 0, 0]])
    # The mean of types would be (1/3 + 1) / 2.
    assert float(found["damage"][1].nanmean()) == pytest.approx(0.5)


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_references_are_scored_as_vqav2_does(matches: int, expected: float) -> None:
    """Mean over leave-one-out subsets; all ten equal is 1."""
    ten = ["red"] * matches + ["blue"] * (10 - matches)
    answers = made_up([["no", "red"], ["yes", "red"]], ["presence", "colour"], ["no", ten])
    found = AnswerTask(source="no", target="yes", types=["presence"]).scores(answers)["accuracy"]
    assert same(found, [[NAN, expected]] * 2)


def test_another_number_of_references_is_refused() -> None:
    """VQAv2's accuracy is defined for ten."""
    answers = made_up([["no", "red"], ["yes", "red"]], ["presence", "colour"], ["no", ["red"] * 9])
    with pytest.raises(BadInputError, match="10"):
        AnswerTask(source="no", target="yes", types=["presence"]).scores(answers)


def test_what_is_no_answer_task_is_refused() -> None:
    """Nothing to change, nothing to keep, no such column."""
    with pytest.raises(BadInputError, match="nothing would change"):
        AnswerTask(source="Yes.", target="yes", types=["presence"])
    task = AnswerTask(source="no", target="yes", types=["presence"])
    with pytest.raises(BadInputError, match=r"no effect.*presence with 'no'"):
        task.scores(made_up([["yes", "red"]] * 2, ["presence", "colour"], ["yes", "red"]))
    with pytest.raises(BadInputError, match=r"no effect.*otherwise than with 'yes'"):
        AnswerTask(target="yes", types=["presence"]).scores(
            made_up([["yes", "red"]] * 2, ["presence", "colour"], ["yes", "red"])
        )
    with pytest.raises(BadInputError, match=r"no damage.*every sample"):
        task.scores(made_up([["no", "no"]] * 2, ["presence", "presence"], ["yes", "red"]))
    with pytest.raises(BadInputError, match=r"no damage.*no known answer"):
        task.scores(made_up([["no", "no"]] * 2, ["presence", "colour"], ["yes", None]))
    with pytest.raises(BadInputError, match=r"no column 'question_type'.*answer_type.*type_column"):
        task.scores(made_up([["no", "no"]] * 2, ["presence", "colour"], ["yes", "no"], "answer_type"))
    other = AnswerTask(source="no", target="yes", types=["presence"], type_column="answer_type")
    assert other.scores(made_up([["no", "no"]] * 2, ["presence", "colour"], ["yes", "no"], "answer_type"))


CAPTION_WORDS = ("a", "Red", "red,", "scared", "redder", "blue.", "circle", "beach", "BEACH.", "beaches", "sand;", "on")


@settings(max_examples=100)
@given(
    texts=st.lists(
        st.lists(st.lists(st.sampled_from(CAPTION_WORDS), max_size=6).map(" ".join), min_size=3, max_size=3),
        min_size=2,
        max_size=3,
    )
)
def test_style_scores_are_those_of_slow_counting(texts: list[list[str]]) -> None:
    """Whole words, in any case, whatever mark stands behind them; one of the three is a question."""
    answers = made_up(texts, ["caption", "caption", "colour"], [None, None, "red,"])
    found = StyleTask(wanted="places", unwanted=["colours", ["Circle"]]).scores(answers)
    places, others = set(words_of("places")), {*words_of("colours"), "circle"}
    for row, said in enumerate(texts):
        for number, text in enumerate(said[:2]):
            words = re.findall("[a-z]+", text.lower())
            wanted, unwanted = any(w in places for w in words), any(w in others for w in words)
            assert found["wanted"][row, number] == wanted
            assert found["unwanted"][row, number] == unwanted
            assert found["effect"][row, number] == (wanted and not unwanted)
            assert found["words"][row, number] == len(words)
            assert found["damage"][row, number].isnan()
        right = [float(one[2].strip().lower() == "red,") for one in (texts[0], said)]
        assert found["damage"][row, 2] == right[0] - right[1]
        assert found["kept"][row].isnan().tolist() == [True, True, False]
        assert found["kept"][row, 2] == (texts[0][2] == said[2])
        assert found["effect"][row, 2].isnan()
        assert found["words"][row, 2].isnan()


def test_style_without_anything_unwanted() -> None:
    """Any words may be wanted; what holds them is enough."""
    answers = made_up([["a dog", "red"], ["a hot   dog", "blue"]], ["caption", "colour"], [None, "red"])
    found = StyleTask(wanted=["hot dog"]).scores(answers)
    assert same(found["effect"], [[0, NAN], [1, NAN]])
    assert same(found["damage"], [[NAN, 0], [NAN, 1]])
    assert StyleTask(wanted=["hot dog"]).about(answers) == ["source", "other"]


def test_what_is_no_style_task_is_refused() -> None:
    """Neither captions nor questions, one text where several are asked for, unknown words."""
    task = StyleTask(wanted="places")
    with pytest.raises(BadInputError, match=r"no effect.*caption"):
        task.scores(made_up([["a", "b"]], ["colour", "colour"], ["a", "b"]))
    with pytest.raises(BadInputError, match=r"no damage.*no questions"):
        task.scores(made_up([["a", "b"]], ["caption", "caption"], ["a", "b"]))
    with pytest.raises(BadInputError, match="unwanted='colours' is one text"):
        StyleTask(wanted="places", unwanted="colours")
    with pytest.raises(BadInputError, match="caption_types='caption' is one text"):
        StyleTask(wanted="places", caption_types="caption")
    with pytest.raises(BadInputError, match=r"plases.*places"):
        StyleTask(wanted="plases").scores(made_up([["a", "b"]], ["caption", "colour"], ["a", "b"]))


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (AnswerTask(source="no", target="yes", types=["a", "b"], goal=Goal(0.8, 0.1)), ["no → yes", "a, b", "“no”"]),
        (AnswerTask(target="yes", types=["a"]), ["any answer → yes"]),
        (StyleTask(wanted="places", unwanted=["colours", ["x", "y"]]), ["places only", "none of colours, x/y"]),
    ],
)
def test_tasks_tell_what_they_measure(task: Task, told: list[str]) -> None:
    """For people, with the goal."""
    found = task.describe()
    assert found["goal"] == {"effect": task.goal.effect, "damage": task.goal.damage}
    assert all(part in f"{found['name']} {found['effect']} {found['damage']}" for part in told)
