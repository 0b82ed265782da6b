"""COCO captions: the official annotations, or Karpathy's splits of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from hooked_mm.datasets.annotations import Annotations, declare, read_json
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.table import InFolder, Table, TableDataModule
from hooked_mm.datasets.templates import CAPTION
from hooked_mm.errors import BadInputError, unknown

OFFICIAL = declare(
    "COCO captions (captions_val2017.json)",
    images={"id": (int,), "file_name": (str,)},
    annotations={"id": (int,), "image_id": (int,), "caption": (str,)},
)
KARPATHY = declare(
    "Karpathy's COCO (dataset_coco.json)",
    images={"cocoid": (int,), "filepath": (str,), "filename": (str,), "split": (str,), "sentences": (list,)},
)
SPLITS = ("train", "restval", "val", "test")

# One picture: its id, its file's name, its split, and (id, words) of each of its captions.
Picture = tuple[int, str, str | None, list[tuple[int, str]]]


class Coco(TableDataModule):
    """COCO captions as samples; the answer is the (first) caption.

    Columns: `image_id`, `captions` (all of the picture), `split` (Karpathy), `caption_id` (with `per="caption"`).

    Args:
        annotations: `captions_*.json` or `dataset_coco.json`.
        images: The folder of pictures: `val2017`; for Karpathy's file the one that holds `train2014` and `val2014`.
        split: Of Karpathy's file; `"train+restval"` is what is usually trained on. None takes all.
        per: One sample per `"image"` (`coco-391895`) or per `"caption"` (`coco-391895-770337`).
        where: Which samples are taken.
        template: What is asked: a name of `TEMPLATES` or words.
        batch_size: Samples per batch.
        num_workers: Processes that decode pictures.

    Raises:
        BadInputError: If the file has another format, misses or repeats entries, or an option does not fit it.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        split: Literal["train", "restval", "val", "test", "train+restval"] | None = None,
        per: Literal["image", "caption"] = "image",
        where: Selection | None = None,
        template: str = CAPTION,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        if per not in ("image", "caption"):
            raise BadInputError(f"per={per!r}; it must be 'image' or 'caption'")
        file = read_json(annotations, OFFICIAL, KARPATHY)
        if file.format is OFFICIAL and split is not None:
            raise BadInputError(f"{str(file.path)!r} holds one split, so split={split!r} can't be chosen; leave it out")
        pictures = list(_official(file) if file.format is OFFICIAL else _karpathy(file, split))
        super().__init__(_table(file, Path(images), pictures, per, split), where, template, batch_size, num_workers)


def _official(file: Annotations) -> Iterator[Picture]:
    captions: dict[int, list[tuple[int, str]]] = defaultdict(list)
    known = {entry["id"] for entry in file.content["images"]}
    for entry in file.content["annotations"]:
        if entry["image_id"] not in known:
            raise BadInputError(
                f"{str(file.path)!r}: caption {entry['id']} is of image {entry['image_id']}, which its images do not "
                "list; take the file as downloaded"
            )
        captions[entry["image_id"]].append((entry["id"], entry["caption"].strip()))
    for entry in file.content["images"]:
        yield entry["id"], entry["file_name"], None, captions[entry["id"]]


def _karpathy(file: Annotations, split: str | None) -> Iterator[Picture]:
    wanted = SPLITS if split is None else split.split("+")
    if not set(wanted) <= set(SPLITS):
        raise unknown("split", str(split), (*SPLITS, "train+restval"))
    for entry in file.content["images"]:
        if entry["split"] not in wanted:
            continue
        try:
            captions = [(item["sentid"], item["raw"].strip()) for item in entry["sentences"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInputError(
                f"{str(file.path)!r}: a sentence of image {entry['cocoid']} lacks 'sentid' or 'raw'; take the file as "
                "downloaded"
            ) from error
        yield entry["cocoid"], f"{entry['filepath']}/{entry['filename']}", entry["split"], captions


def _table(file: Annotations, folder: Path, pictures: list[Picture], per: str, split: str | None) -> Table:
    if not pictures:
        raise BadInputError(f"{str(file.path)!r} has no image of split {split!r}; choose another")
    rows: list[tuple[Picture, tuple[int, str] | None]] = []
    for picture in pictures:
        captions = picture[3]
        rows += [(picture, one) for one in (captions if per == "caption" else captions[:1])]
        if per == "image" and not captions:
            rows.append((picture, None))
    columns: dict[str, Any] = {
        "image_id": [picture[0] for picture, _ in rows],
        "captions": [[words for _, words in picture[3]] for picture, _ in rows],
    }
    if file.format is KARPATHY:
        columns["split"] = [picture[2] for picture, _ in rows]
    ids = [f"coco-{picture[0]}" for picture, _ in rows]
    if per == "caption":
        columns["caption_id"] = [one[0] for _, one in rows if one]
        ids = [f"{name}-{number}" for name, number in zip(ids, columns["caption_id"], strict=True)]
    return Table(
        source=str(file.path),
        ids=ids,
        pictures=InFolder(folder, pa.array([picture[1] for picture, _ in rows])),
        columns=columns,
        answer=[one[1] if one else None for _, one in rows],
        made_of={"files": {file.path.name: file.digest}, "images": folder.name, "split": split, "per": per},
    )
