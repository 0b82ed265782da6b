"""VQA-RAD: questions that clinicians asked about radiology pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pyarrow as pa

from hooked_mm.datasets.annotations import declare, read_json
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.table import InFolder, Table, TableDataModule
from hooked_mm.errors import BadInputError, unknown

TEXTS = ("question_type", "answer_type", "phrase_type", "image_organ", "image_name")
FORMAT = declare(
    "VQA-RAD (VQA_RAD Dataset Public.json)",
    whole={
        "qid": (int, str),
        "question": (str,),
        # Counts are numbers in the file.
        "answer": (str, int, float),
        **dict.fromkeys(TEXTS, (str,)),
    },
)
SPLITS = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
"""The split that a kind of phrase belongs to."""


class VqaRad(TableDataModule):
    """VQA-RAD as samples, `vqa-rad-1` and so on.

    Columns: `question`, `qid`, `split`, `question_type`, `answer_type` (OPEN, CLOSED), `phrase_type`, `image_organ`,
    `image_name`. White space around values, which the file has here and there, is taken off.

    Args:
        annotations: `VQA_RAD Dataset Public.json`.
        images: The folder of pictures, `VQA_RAD Image Folder`.
        split: `"test"`: the phrases marked so; `"train"`: the others; None: all.
        where: Which samples are taken.
        template: What wraps the question: a name of `TEMPLATES` or words with `{text}`; None asks it as it stands.
        batch_size: Samples per batch.
        num_workers: Processes that decode pictures.

    Raises:
        BadInputError: If the file has another format, or misses or repeats entries.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        split: Literal["train", "test"] | None = None,
        where: Selection | None = None,
        template: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(_table(Path(annotations), Path(images), split), where, template, batch_size, num_workers)


def _table(path: Path, folder: Path, split: str | None) -> Table:
    if split not in (None, "train", "test"):
        raise unknown("split", str(split), ("train", "test"))
    file = read_json(path, FORMAT)
    splits = []
    for entry in file.content:
        phrase = entry["phrase_type"].strip()
        if phrase not in SPLITS:
            raise BadInputError(
                f"{str(path)!r}: question {entry['qid']} has phrase_type={phrase!r}; known: {', '.join(SPLITS)}"
            )
        splits.append(SPLITS[phrase])
    items = [entry for entry, name in zip(file.content, splits, strict=True) if split in (None, name)]
    if not items:
        raise BadInputError(f"{str(path)!r} has no question of split {split!r}; choose the other")
    columns = {name: [item[name].strip() for item in items] for name in TEXTS}
    return Table(
        source=str(path),
        ids=[f"vqa-rad-{item['qid']}" for item in items],
        pictures=InFolder(folder, pa.array(columns["image_name"])),
        columns={
            "qid": [str(item["qid"]) for item in items],
            "split": [name for name in splits if split in (None, name)],
            **columns,
        },
        question=[item["question"].strip() for item in items],
        answer=[str(item["answer"]).strip() for item in items],
        made_of={"files": {path.name: file.digest}, "images": folder.name, "split": split},
    )
