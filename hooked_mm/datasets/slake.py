"""SLAKE: questions in English and Chinese about radiology pictures."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from hooked_mm.datasets.annotations import declare, read_json
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.table import InFolder, Table, TableDataModule
from hooked_mm.errors import unknown

TEXTS = ("q_lang", "location", "modality", "answer_type", "content_type")
FORMAT = declare(
    "SLAKE (train.json, validate.json, test.json)",
    whole={
        "img_id": (int,),
        "img_name": (str,),
        "question": (str,),
        "answer": (str,),
        "qid": (int,),
        **dict.fromkeys(TEXTS, (str,)),
    },
)


class Slake(TableDataModule):
    """SLAKE as samples, `slake-0` and so on.

    Columns: `question`, `qid`, `img_id`, `img_name`, `q_lang`, `location`, `modality`, `answer_type` (OPEN, CLOSED),
    `content_type`.

    Args:
        annotations: `train.json`, `validate.json` (`validation.json`) or `test.json`.
        images: The folder of pictures, `imgs`.
        language: `"en"`, `"zh"`, or None for both.
        where: Which samples are taken.
        template: What wraps the question: a name of `TEMPLATES` or words with `{text}`; None asks it as it stands.
        batch_size: Samples per batch.
        num_workers: Processes that decode pictures.

    Raises:
        BadInputError: If the file has another format, misses or repeats entries, or has nothing in the language.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        language: str | None = None,
        where: Selection | None = None,
        template: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(_table(Path(annotations), Path(images), language), where, template, batch_size, num_workers)


def _table(path: Path, folder: Path, language: str | None) -> Table:
    file = read_json(path, FORMAT)
    languages = sorted({entry["q_lang"] for entry in file.content})
    if language is not None and language not in languages:
        raise unknown(f"language in {str(path)!r}", language, languages)
    items = [entry for entry in file.content if language in (None, entry["q_lang"])]
    return Table(
        source=str(path),
        ids=[f"slake-{item['qid']}" for item in items],
        pictures=InFolder(folder, pa.array([item["img_name"] for item in items])),
        columns={name: [item[name] for item in items] for name in ("qid", "img_id", "img_name", *TEXTS)},
        question=[item["question"] for item in items],
        answer=[item["answer"] for item in items],
        made_of={"files": {path.name: file.digest}, "images": folder.name, "language": language},
    )
