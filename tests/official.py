"""Small annotation files written exactly as the official ones are: their fields, nesting and counts per item."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

CAPTIONS = {
    391895: [
        "A man with a red helmet on a small moped on a dirt road. ",
        "Man riding a motor bike on a dirt road on the countryside.",
        "A man riding on the back of a motorcycle.",
        "A dirt path with a young person on a motor bike rests to the foreground of a verdant area with a bridge.",
        "A man in a red shirt and a red hat is on a motorcycle on a hill side.",
    ],
    522418: [
        "A woman wearing a net on her head cutting a cake. ",
        "A woman cutting a large white sheet cake.",
        "A woman wearing a hair net cutting a large sheet cake.",
        "there is a woman that is cutting a white cake",
        "A woman marking a cake with the back of a chef's knife. \n",
    ],
    184613: [
        "A child holding a flowered umbrella and petting a yak.",
        "A young man holding an umbrella next to a herd of cattle.",
        "a young boy barefoot holding an umbrella touching the horn of a cow",
        "A young boy with an umbrella who is touching the horn of a cow.",
        "A boy holding an umbrella while standing next to livestock.",
    ],
}
"""Five captions per image id."""


def dump(path: Path, content: Any) -> Path:
    """Write JSON; the path again."""
    path.write_text(json.dumps(content))
    return path


def _info() -> dict[str, Any]:
    return {
        "description": "COCO 2014 Dataset",
        "url": "http://cocodataset.org",
        "version": "1.0",
        "year": 2014,
        "contributor": "COCO Consortium",
        "date_created": "2017/09/01",
    }


def coco_official(captions: Mapping[int, Sequence[str]] = CAPTIONS, subset: str = "val2014") -> dict[str, Any]:
    """`captions_val2014.json`: images, and captions apart from them in an order of their own."""
    annotations = [
        {"image_id": image, "id": 770337 + 1000 * number + place, "caption": words}
        for place in range(max(map(len, captions.values())))
        for number, (image, options) in enumerate(captions.items())
        for words in options[place : place + 1]
    ]
    return {
        "info": _info(),
        "images": [
            {
                "license": 3,
                "file_name": f"COCO_{subset}_{image:012d}.jpg",
                "coco_url": f"http://images.cocodataset.org/{subset}/COCO_{subset}_{image:012d}.jpg",
                "height": 360,
                "width": 640,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
                "id": image,
            }
            for image in captions
        ],
        "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}],
        "annotations": annotations,
    }


def coco_karpathy(splits: Sequence[str] = ("test", "restval", "train")) -> dict[str, Any]:
    """`dataset_coco.json`: sentences within images."""
    images = []
    for number, ((image, captions), split) in enumerate(zip(CAPTIONS.items(), splits, strict=True)):
        folder = "train2014" if split == "train" else "val2014"
        sentids = [770337 + 1000 * number + place for place in range(len(captions))]
        images.append(
            {
                "filepath": folder,
                "sentids": sentids,
                "filename": f"COCO_{folder}_{image:012d}.jpg",
                "imgid": number,
                "split": split,
                "sentences": [
                    {"tokens": words.lower().strip(" .\n").split(), "raw": words, "imgid": number, "sentid": sentid}
                    for words, sentid in zip(captions, sentids, strict=True)
                ],
                "cocoid": image,
            }
        )
    return {"images": images, "dataset": "coco"}


QUESTIONS = (
    (262148, 0, "Where is he looking?", "down", "where is the", "other"),
    (262148, 1, "What are the people in the background doing?", "watching", "what are the", "other"),
    (393225, 0, "How many trees are there?", "2", "how many", "number"),
    (393225, 1, "Is the cat on a cattle grid?", "no", "is the", "yes/no"),
)
"""Image id, number of the question, question, commonest answer, question type, answer type."""


def vqa_questions(items: Sequence[tuple] = QUESTIONS, subset: str = "val2014") -> dict[str, Any]:
    """`v2_OpenEnded_mscoco_val2014_questions.json`."""
    return {
        "info": _info(),
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "Creative Commons"},
        "data_subtype": subset,
        "questions": [
            {"image_id": image, "question": words, "question_id": image * 1000 + number}
            for image, number, words, *_ in items
        ],
    }


def vqa_annotations(items: Sequence[tuple] = QUESTIONS, subset: str = "val2014") -> dict[str, Any]:
    """`v2_mscoco_val2014_annotations.json`: ten answers each, seven of them the commonest; in the reverse order."""
    return {
        "info": _info(),
        "license": {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "Creative Commons"},
        "data_subtype": subset,
        "annotations": [
            {
                "question_type": question_type,
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": answer if place < 7 else "table", "answer_confidence": "yes", "answer_id": place + 1}
                    for place in range(10)
                ],
                "image_id": image,
                "answer_type": answer_type,
                "question_id": image * 1000 + number,
            }
            for image, number, _, answer, question_type, answer_type in reversed(items)
        ],
        "data_type": "mscoco",
    }


MMVP = """Index,Question,Options,Correct Answer
1,Are the butterfly's wings closer to being open or closed?,(a) Open (b) Closed,(a)
2,Are the butterfly's wings closer to being open or closed?,(a) Open (b) Closed,(b)
3,"In the picture, is the key ""Z"" pressed?",(a) Yes (b) No,(b)
4,"In the picture, is the key ""Z"" pressed?",(a) Yes (b) No,(a)
"""
"""`Questions.csv`."""


def vqa_rad() -> list[dict[str, Any]]:
    """`VQA_RAD Dataset Public.json`, with its odd values: counts that are numbers, white space, ids as text."""
    rows = [
        ("0", "freeform", "Are regions of the brain infarcted?", "Yes", "CLOSED", "PRES", "HEAD", "synpic54610.jpg"),
        ("1", "para", "Is there evidence of infarction?", "Yes", "CLOSED ", "PRES", "HEAD", "synpic54610.jpg"),
        ("2", "test_freeform", "How many lesions are seen?", 3, "OPEN", "COUNT", "ABD", "synpic29265.jpg"),
        ("3", "test_para", "What is the size of it? ", "5.6cm ", "OPEN", "SIZE", "CHEST ", "synpic20260.jpg"),
    ]
    return [
        {
            "qid": qid,
            "phrase_type": phrase,
            "qid_linked_id": "03f451ca-de62-4617-9679-e836026a7642",
            "image_case_url": "https://medpix.nlm.nih.gov/case?id=48e1dd0e-8552-46ad-a354-5eb55be86de6",
            "image_name": image,
            "image_organ": organ,
            "evaluation": "not evaluated",
            "question": question,
            "question_rephrase": "NULL",
            "question_relation": "NULL",
            "question_frame": "NULL",
            "question_type": question_type,
            "answer": answer,
            "answer_type": answer_type,
        }
        for qid, phrase, question, answer, answer_type, question_type, organ, image in rows
    ]


def slake() -> list[dict[str, Any]]:
    """`train.json` of SLAKE, in both languages."""
    rows = [
        (1, "What modality is used to take this image?", "MRI", "en", "Abdomen", "MRI", "OPEN", "Modality"),
        (1, "图中包含的器官有哪些?", "肝脏", "zh", "Abdomen", "MRI", "OPEN", "Organ"),
        (102, "Does the picture contain liver?", "No", "en", "Lung", "CT", "CLOSED", "Organ"),
    ]
    return [
        {
            "img_id": image,
            "img_name": f"xmlab{image}/source.jpg",
            "question": question,
            "answer": answer,
            "q_lang": language,
            "location": location,
            "modality": modality,
            "answer_type": answer_type,
            "base_type": "vqa",
            "content_type": content_type,
            "triple": ["vhead", "_", "_"],
            "qid": qid,
        }
        for qid, (image, question, answer, language, location, modality, answer_type, content_type) in enumerate(rows)
    ]


OWN: list[dict[str, Any]] = [
    {"key": "a", "image": "1.jpg", "ask": "what is it ?", "say": "a cat", "score": 0.5, "tags": ["x"]},
    {"key": "b", "image": ["1.jpg", "sub/2.png"], "ask": "and these ?", "say": None, "score": 1.0},
    {"key": "c", "image": None, "ask": "and without ?", "say": "cattle", "score": 2.5, "tags": []},
]


def jsonl(path: Path, rows: Sequence[Any] = OWN) -> Path:
    """A JSONL file, with a blank line in it."""
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    return path


PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ARROW_FEATURES = {
    "image": {"_type": "Image"},
    "question": {"dtype": "string", "_type": "Value"},
    "answer": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    "mask": {"_type": "Image"},
    "idx": {"dtype": "int64", "_type": "Value"},
}
ARROW_SCHEMA = pa.schema(
    [
        ("image", PICTURE),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("label", pa.int64()),
        ("mask", PICTURE),
        ("idx", pa.int64()),
    ]
)


def noise(seed: int) -> Image.Image:
    """A picture that PNG keeps exactly."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    """Its file."""
    buffer = io.BytesIO()
    noise(seed).save(buffer, "PNG")
    return buffer.getvalue()


def arrow_rows(count: int = 5) -> list[dict[str, Any]]:
    """Rows with pictures as bytes, by path, cut off, and missing."""
    pictures: list[Any] = [{"bytes": png(n), "path": f"{n}.png"} for n in range(count)]
    pictures[1:4] = [{"bytes": None, "path": "/nowhere/1.png"}, {"bytes": png(2)[:60], "path": None}, None][: count - 1]
    return [
        {
            "image": pictures[n],
            "question": f"what is {n} ?",
            "answer": f"thing {n}",
            "label": (0, 1, -1)[n % 3],
            "mask": {"bytes": b"", "path": None},
            "idx": 10 * n,
        }
        for n in range(count)
    ]


def save_to_disk(
    folder: Path,
    items: list[dict[str, Any]],
    schema: pa.Schema = ARROW_SCHEMA,
    features: Any = ARROW_FEATURES,
    split: str | None = "train",
) -> Path:
    """As `Dataset.save_to_disk(folder, num_shards=2)` writes, in batches of two rows."""
    folder.mkdir(parents=True, exist_ok=True)
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    marked = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    half = (len(items) + 1) // 2
    files = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, part in zip(files, (items[:half], items[half:]), strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, marked) as writer:
            writer.write_table(pa.Table.from_pylist(part, schema=marked), max_chunksize=2)
    state = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": "a1b2c3d4e5f60718",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    return folder
