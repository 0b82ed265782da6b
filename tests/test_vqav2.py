"""VQA v2, from files written as the official ones are."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from hooked_mm.data import Sample
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.vqav2 import VqaV2, picture_name
from hooked_mm.errors import BadInputError
from tests.official import QUESTIONS, coco_official, dump, vqa_annotations, vqa_questions


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return dump(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", vqa_questions())


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    return dump(tmp_path / "v2_mscoco_val2014_annotations.json", vqa_annotations())


def test_questions_with_their_answers(questions: Path, annotations: Path) -> None:
    """The questions' order, whatever the annotations'; ten answers each, the commonest is the answer."""
    data = VqaV2(questions, "val2014", annotations, template="llava-short")
    assert data.ids() == ["vqav2-262148000", "vqav2-262148001", "vqav2-393225000", "vqav2-393225001"]
    assert [data.dataset[n].answer for n in range(4)] == ["down", "watching", "2", "no"]
    assert data.dataset[2] == Sample(
        "vqav2-393225000",
        Path("val2014/COCO_val2014_000000393225.jpg"),
        "How many trees are there?\nAnswer the question using a single word or phrase.",
        "2",
        {
            "question": "How many trees are there?",
            "question_id": 393225000,
            "image_id": 393225,
            "question_type": "how many",
            "answer_type": "number",
            "answers": ["2"] * 7 + ["table"] * 3,
        },
    )


def test_questions_without_answers(questions: Path) -> None:
    """As in the test split: the same ids, no answers, no columns of them."""
    data = VqaV2(questions, "val2014")
    assert data.dataset[0].answer is None
    assert data.dataset[0].text == "Where is he looking?"
    assert data.dataset[0].columns.keys() == {"question", "question_id", "image_id"}


@pytest.mark.parametrize(
    ("subset", "name"),
    [
        ("train2014", "COCO_train2014_000000000042.jpg"),
        ("val2014", "COCO_val2014_000000000042.jpg"),
        ("test2015", "COCO_test2015_000000000042.jpg"),
        ("test-dev2015", "COCO_test2015_000000000042.jpg"),
    ],
)
def test_names_of_pictures(subset: str, name: str) -> None:
    """As COCO's folders have them; the pictures of test-dev are those of test."""
    assert picture_name(subset, 42) == name


def test_filters(questions: Path, annotations: Path) -> None:
    """By type, by the words of question or answers; "cat" is not in "cattle"."""
    cases = {
        (2, 3): Selection(equal={"answer_type": ["number", "yes/no"]}),
        (3,): Selection(words=["Cat"], within="question"),
        (1,): Selection(words=["watching"]),
        (0, 1, 2, 3): Selection(words=["table"], within="answers"),
        (0,): Selection(ids=["vqav2-262148000"]),
    }
    for kept, where in cases.items():
        data = VqaV2(questions, "x", annotations, where=where)
        assert data.ids() == [f"vqav2-{QUESTIONS[n][0] * 1000 + QUESTIONS[n][1]}" for n in kept]


Q, A = vqa_questions(), vqa_annotations()
NO_WORDS, OTHER_IMAGE = deepcopy(A), deepcopy(A)
del NO_WORDS["annotations"][1]["answers"][9]["answer"]
OTHER_IMAGE["annotations"][0]["image_id"] = 7


@pytest.mark.parametrize(
    ("asked", "answered", "parts"),
    [
        (
            Q,
            {**A, "annotations": A["annotations"][1:]},
            ["question 393225001 of", "has no annotation"],
        ),
        ({**Q, "questions": Q["questions"][1:]}, A, ["answers question 262148000", "does not ask"]),
        (Q, {**A, "annotations": A["annotations"] * 2}, ["answers question 393225001 twice"]),
        ({**Q, "questions": Q["questions"] * 2}, None, ["two entries that are 'vqav2-262148000'"]),
        (Q, vqa_annotations(subset="train2014"), ["questions of 'val2014'", "answers of 'train2014'"]),
        (Q, OTHER_IMAGE, ["question 393225001 is about image 393225", "about 7"]),
        (Q, NO_WORDS, ["an answer to question 393225000 lacks 'answer'"]),
        (A, None, ["is not VQA v2 questions", "looks like VQA v2 annotations"]),
        (Q, Q, ["is not VQA v2 annotations", "looks like VQA v2 questions"]),
        (coco_official(), None, ["looks like COCO captions"]),
        ({**Q, "data_type": "abstract_v002"}, None, ["data_type='abstract_v002'"]),
        ({name: value for name, value in Q.items() if name != "data_subtype"}, None, ["data_subtype=None"]),
    ],
)
def test_refusals_name_file_value_and_remedy(tmp_path: Path, asked: Any, answered: Any, parts: list[str]) -> None:
    """Whatever is wrong with a file, or with the two of them."""
    one = dump(tmp_path / "questions.json", asked)
    two = None if answered is None else dump(tmp_path / "annotations.json", answered)
    with pytest.raises(BadInputError) as error:
        VqaV2(one, "x", two)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_templates_must_hold_the_question(questions: Path) -> None:
    """Else all would be asked the same."""
    with pytest.raises(BadInputError, match=r"must hold \{text\}"):
        VqaV2(questions, "x", template="llava-caption")


def test_the_manifest_says_what_decides_the_content(questions: Path, annotations: Path) -> None:
    """With answers it is other data than without, and answers are told by their content."""
    one, two = VqaV2(questions, "x").describe(), VqaV2(questions, "x", annotations).describe()
    assert one != two
    content = vqa_annotations()
    content["annotations"][2]["multiple_choice_answer"] = "up"
    assert VqaV2(questions, "x", dump(annotations, content)).describe() != two


def test_many_questions_are_no_samples_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made of 20,000 questions before it is asked for; ids come without samples."""
    items = [(1 + n // 5, n % 5, f"What is thing {n}?") for n in range(20_000)]
    path = dump(tmp_path / "questions.json", vqa_questions(items))
    monkeypatch.setattr("hooked_mm.datasets.table.Sample", lambda *_: pytest.fail("a sample was made"))
    data = VqaV2(path, "x")
    assert (len(data.ids()), data.ids()[7]) == (20_000, "vqav2-2002")
