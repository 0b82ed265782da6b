"""COCO captions, from files written as the official ones and Karpathy's are."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from hooked_mm.data import Sample
from hooked_mm.datasets.coco import Coco
from hooked_mm.datasets.selection import Selection
from hooked_mm.errors import BadInputError
from tests.official import CAPTIONS, coco_karpathy, coco_official, dump, slake, vqa_questions


@pytest.fixture
def official(tmp_path: Path) -> Path:
    return dump(tmp_path / "captions_val2014.json", coco_official())


@pytest.fixture
def karpathy(tmp_path: Path) -> Path:
    return dump(tmp_path / "dataset_coco.json", coco_karpathy())


def samples(data: Coco) -> list[Sample]:
    """All samples of a data module."""
    return [data.dataset[index] for index in range(len(data.dataset))]  # type: ignore[arg-type]


def test_official_annotations_give_one_sample_per_image(official: Path) -> None:
    """The file's order; all five captions in a column, the first as answer, without stray white space."""
    found = samples(Coco(official, "pictures/val2014"))
    assert [sample.id for sample in found] == ["coco-391895", "coco-522418", "coco-184613"]
    assert found[1] == Sample(
        "coco-522418",
        Path("pictures/val2014/COCO_val2014_000000522418.jpg"),
        "Describe the image in one sentence.",
        "A woman wearing a net on her head cutting a cake.",
        {"image_id": 522418, "captions": [words.strip() for words in CAPTIONS[522418]]},
    )


def test_one_sample_per_caption(official: Path, karpathy: Path) -> None:
    """Every caption is the answer once, under an id that both files give it."""
    for path, kinds in ((official, {}), (karpathy, {"split": "restval"})):
        found = samples(Coco(path, "x", per="caption"))
        assert len(found) == 15
        assert found[6].id == "coco-522418-771338"
        assert found[6].answer == CAPTIONS[522418][1]
        assert found[6].columns == {
            "image_id": 522418,
            "captions": [words.strip() for words in CAPTIONS[522418]],
            "caption_id": 771338,
            **kinds,
        }


def test_karpathys_splits(karpathy: Path) -> None:
    """Pictures lie in the folder of their year; restval counts as training only where asked."""
    found = samples(Coco(karpathy, "coco"))
    assert [sample.columns["split"] for sample in found] == ["test", "restval", "train"]
    assert found[0].images == Path("coco/val2014/COCO_val2014_000000391895.jpg")
    assert found[2].images == Path("coco/train2014/COCO_train2014_000000184613.jpg")
    assert Coco(karpathy, "coco", split="train").ids() == ["coco-184613"]
    assert Coco(karpathy, "coco", split="train+restval").ids() == ["coco-522418", "coco-184613"]


def test_filters(official: Path) -> None:
    """Words in the answer or in any caption; ids do not depend on what is left out."""
    assert Coco(official, "x", where=Selection(words=["cow", "yak"], within="captions")).ids() == ["coco-184613"]
    assert Coco(official, "x", where=Selection(words=["red"])).ids() == ["coco-391895"]
    assert Coco(official, "x", where=Selection(word_class="colours", within="captions")).ids() == [
        "coco-391895",
        "coco-522418",
    ]
    assert Coco(official, "x", where=Selection(equal={"image_id": 522418})).ids() == ["coco-522418"]
    with pytest.raises(BadInputError, match="none of the 3 samples left has one of \\['cow'\\] in its answer"):
        Coco(official, "x", where=Selection(words=["cow"]))


def test_an_image_without_captions_has_no_answer(tmp_path: Path) -> None:
    """A model can still caption it; per caption there is nothing to hand out."""
    content = coco_official()
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 522418]
    path = dump(tmp_path / "x.json", content)
    found = samples(Coco(path, "x"))
    assert (found[1].answer, found[1].columns["captions"]) == (None, [])
    assert len(samples(Coco(path, "x", per="caption"))) == 10


def without(content: Any, key: str, field: str) -> Any:
    """The content with one field of the second entry of a list missing."""
    changed = deepcopy(content)
    del changed[key][1][field]
    return changed


OFFICIAL, KARPATHY = coco_official(), coco_karpathy()
STRAY = {**OFFICIAL, "annotations": [*OFFICIAL["annotations"], {"image_id": 9, "id": 1, "caption": "A."}]}
NO_RAW = deepcopy(KARPATHY)
del NO_RAW["images"][1]["sentences"][2]["raw"]


@pytest.mark.parametrize(
    ("content", "options", "parts"),
    [
        (
            without(OFFICIAL, "annotations", "caption"),
            {},
            ["entry 1 of 'annotations' has no 'caption'", "image_id, id"],
        ),
        (without(OFFICIAL, "images", "id"), {}, ["entry 1 of 'images' has no 'id'"]),
        (without(KARPATHY, "images", "cocoid"), {}, ["entry 1 of 'images' has no 'cocoid'"]),
        (NO_RAW, {}, ["a sentence of image 522418"]),
        (STRAY, {}, ["caption 1 is of image 9"]),
        ({**OFFICIAL, "images": OFFICIAL["images"] * 2}, {}, ["two entries that are 'coco-391895'"]),
        ({**KARPATHY, "images": KARPATHY["images"] * 2}, {}, ["two entries that are 'coco-391895'"]),
        (OFFICIAL, {"split": "val"}, ["holds one split", "leave it out"]),
        (KARPATHY, {"split": "val"}, ["no image of split 'val'"]),
        (KARPATHY, {"split": "validation"}, ["no split 'validation'", "train+restval"]),
        (OFFICIAL, {"per": "sentence"}, ["per='sentence'"]),
        (OFFICIAL, {"template": "What is {text}?"}, ["no questions"]),
        (
            vqa_questions(),
            {},
            ["is not COCO captions", "questions (each with image_id, question, question_id)", "like VQA"],
        ),
        (slake(), {}, ["a list of objects with img_id", "looks like SLAKE"]),
        (
            {"images": OFFICIAL["images"], "categories": []},
            {},
            ["images (each with license", "categories"],
        ),
    ],
)
def test_refusals_name_file_value_and_remedy(tmp_path: Path, content: Any, options: dict, parts: list[str]) -> None:
    """Whatever is wrong with a file or does not fit it."""
    path = dump(tmp_path / "file.json", content)
    with pytest.raises(BadInputError) as error:
        Coco(path, "x", **options)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_the_manifest_says_what_decides_the_content(official: Path, karpathy: Path) -> None:
    """Another file, split or selection is another data set; the same again, elsewhere, is the same."""
    one = Coco(official, "a/val2014").describe()
    assert one == Coco(official, "b/val2014").describe()
    others = [
        Coco(official, "a/train2014"),
        Coco(official, "a/val2014", per="caption"),
        Coco(official, "a/val2014", template="llava-caption"),
        Coco(official, "a/val2014", where=Selection(limit=3)),
        Coco(karpathy, "a/val2014"),
        Coco(karpathy, "a/val2014", split="test"),
    ]
    said = [one, *(data.describe() for data in others)]
    assert all(said[i] != said[j] for i in range(len(said)) for j in range(i))
    content = coco_official()
    content["annotations"][0]["caption"] += "!"
    assert Coco(dump(official, content), "a/val2014").describe() != one
