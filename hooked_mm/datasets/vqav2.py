"""VQA v2: the official questions, with or without the ten answers that people gave to each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from hooked_mm.datasets.annotations import Annotations, declare, first_repeated, read_json
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.table import InFolder, Table, TableDataModule
from hooked_mm.errors import BadInputError

QUESTIONS = declare(
    "VQA v2 questions (v2_OpenEnded_mscoco_val2014_questions.json)",
    questions={"image_id": (int,), "question": (str,), "question_id": (int,)},
)
ANSWERS = declare(
    "VQA v2 annotations (v2_mscoco_val2014_annotations.json)",
    annotations={
        "question_id": (int,),
        "image_id": (int,),
        "question_type": (str,),
        "answer_type": (str,),
        "multiple_choice_answer": (str,),
        "answers": (list,),
    },
)


class VqaV2(TableDataModule):
    """VQA v2 as samples, `vqav2-262148000` and so on; the answer is the commonest of the ten.

    Columns: `question`, `question_id`, `image_id`; with annotations also `question_type`, `answer_type` and `answers`,
    all ten.

    Args:
        questions: `v2_OpenEnded_mscoco_*_questions.json`.
        images: The folder of pictures that the questions are about: `train2014`, `val2014` or `test2015`.
        annotations: `v2_mscoco_*_annotations.json` of the same subset; None where answers are not published.
        where: Which samples are taken.
        template: What wraps the question: a name of `TEMPLATES` or words with `{text}`; None asks it as it stands.
        batch_size: Samples per batch.
        num_workers: Processes that decode pictures.

    Raises:
        BadInputError: If a file has another format, misses or repeats entries, or the two do not belong together.
    """

    def __init__(
        self,
        questions: str | Path,
        images: str | Path,
        annotations: str | Path | None = None,
        where: Selection | None = None,
        template: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        asked = read_json(questions, QUESTIONS)
        answered = None if annotations is None else read_json(annotations, ANSWERS, shorten=_words)
        super().__init__(_table(asked, answered, Path(images)), where, template, batch_size, num_workers)


def picture_name(subset: str, image_id: int) -> str:
    """The file that a question is about: `COCO_val2014_000000000042.jpg`. Test-dev is a part of test."""
    return f"COCO_{subset.replace('test-dev', 'test')}_{image_id:012d}.jpg"


def _table(asked: Annotations, answered: Annotations | None, folder: Path) -> Table:
    subset, kind = (asked.content.get(name) for name in ("data_subtype", "data_type"))
    if not isinstance(subset, str) or kind != "mscoco":
        raise BadInputError(
            f"{str(asked.path)!r} has data_type={kind!r}, data_subtype={subset!r}; pictures can only be named where "
            "they are 'mscoco' and a subset such as 'val2014'"
        )
    items = asked.content["questions"]
    columns: dict[str, Any] = {
        "question_id": [item["question_id"] for item in items],
        "image_id": [item["image_id"] for item in items],
    }
    answer = None
    files = {asked.path.name: asked.digest}
    if answered is not None:
        matching = _matching(asked, answered)
        columns |= {name: [item[name] for item in matching] for name in ("question_type", "answer_type")}
        columns["answers"] = [_answers(answered, item) for item in matching]
        answer = [item["multiple_choice_answer"] for item in matching]
        files[answered.path.name] = answered.digest
    return Table(
        source=str(asked.path),
        ids=[f"vqav2-{number}" for number in columns["question_id"]],
        pictures=InFolder(folder, pa.array([picture_name(subset, number) for number in columns["image_id"]])),
        columns=columns,
        question=[item["question"] for item in items],
        answer=answer,
        made_of={"files": files, "images": folder.name},
    )


def _matching(asked: Annotations, answered: Annotations) -> list[dict[str, Any]]:
    """The annotations in the order of the questions, one for each."""
    subsets = [file.content.get("data_subtype") for file in (asked, answered)]
    if subsets[0] != subsets[1]:
        raise BadInputError(
            f"{str(asked.path)!r} are questions of {subsets[0]!r}, {str(answered.path)!r} answers of {subsets[1]!r}; "
            "give two files of the same subset"
        )
    entries = answered.content["annotations"]
    repeated = first_repeated(entry["question_id"] for entry in entries)
    if repeated is not None:
        raise BadInputError(f"{str(answered.path)!r} answers question {repeated} twice; take the file as downloaded")
    by_question = {entry["question_id"]: entry for entry in entries}
    questions = {item["question_id"]: item["image_id"] for item in asked.content["questions"]}
    for number, image in questions.items():
        if number not in by_question:
            raise BadInputError(
                f"question {number} of {str(asked.path)!r} has no annotation in {str(answered.path)!r}; give the files "
                "of the same subset, or no annotations"
            )
        if by_question[number]["image_id"] != image:
            raise BadInputError(
                f"question {number} is about image {image} in {str(asked.path)!r}, but about "
                f"{by_question[number]['image_id']} in {str(answered.path)!r}; take both as downloaded"
            )
    if len(by_question) > len(questions):
        lost = next(number for number in by_question if number not in questions)
        raise BadInputError(
            f"{str(answered.path)!r} answers question {lost}, which {str(asked.path)!r} does not ask; give the files "
            "of the same subset"
        )
    return [by_question[item["question_id"]] for item in asked.content["questions"]]


def _words(entry: dict[str, Any]) -> Any:
    """One person's answer as its words alone: there are millions of them."""
    return entry.get("answer") if "answer_id" in entry else entry


def _answers(file: Annotations, item: dict[str, Any]) -> list[str]:
    if not all(isinstance(words, str) for words in item["answers"]):
        raise BadInputError(
            f"{str(file.path)!r}: an answer to question {item['question_id']} lacks 'answer' or 'answer_id'; take the "
            "file as downloaded"
        )
    return item["answers"]
