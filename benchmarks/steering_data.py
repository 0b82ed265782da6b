"""Data of the steering benchmarks: so many questions of each sort, of scenes; VQA v2 in three parts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.datasets.coco import Coco
from hooked_mm.datasets.vqav2 import VqaV2
from hooked_mm.scenes.captions import STYLES, caption
from hooked_mm.scenes.dataset import SceneDataset
from steering.tasks import AnswerTask


class Part(Dataset):
    """Some samples of a data set, by their numbers."""

    def __init__(self, whole: Any, numbers: Sequence[int]) -> None:
        self.whole, self.numbers = whole, list(numbers)
        names = whole.ids()
        self._ids = [names[number] for number in self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def ids(self) -> list[str]:
        """The samples' ids, in order."""
        return self._ids

    def __getitem__(self, index: int) -> Sample:
        return self.whole[self.numbers[index]]


class Described(SampleDataModule):
    """Samples whose manifest tells them from others of the same number: by a digest of ids and prompts."""

    def __init__(self, dataset: Any, batch_size: int = 64, prompts: Sequence[str] = ()) -> None:
        super().__init__(dataset, batch_size)
        told = "\n".join([*self.ids(), *prompts])
        self.digest = hashlib.sha256(told.encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Name, number and digest."""
        return {**super().describe(), "digest": self.digest}


class Chosen(Described):
    """A part of a data set as a data module."""

    def __init__(self, whole: Any, numbers: Sequence[int], batch_size: int = 64, prompts: Sequence[str] = ()) -> None:
        super().__init__(Part(whole, numbers), batch_size, prompts)

    @classmethod
    def of(cls, questions: SceneDataset, task: AnswerTask, source: int, same: int, others: int) -> Chosen:
        """The first so many questions whose true answer is the source, of the same type, and of other types.

        By the truth, which is no more than a way to have enough of each: what counts as source is what a model says.
        """
        wanted = {"source": source, "same": same, "others": others}
        numbers = []
        for number in range(len(questions)):
            asked = questions.asked(number)
            what = "others" if asked.type not in task.types else "source" if asked.answer == task.source else "same"
            if wanted[what]:
                wanted[what] -= 1
                numbers.append(number)
            if not any(wanted.values()):
                break
        return cls(questions, numbers)


@dataclass(frozen=True)
class Pictures:
    """What captions are steered on.

    Attributes:
        prompts: Style -> the prompt that asks for it; `any` is the default prompt.
        train: Pictures that vectors come from.
        questions: Questions that gates are learnt from.
        validation: Per style, captions (type `caption`, with `references` in the style) and questions.
        test: The same of others.
        siblings: Whether the model has a fine-tuned sibling for each style.
    """

    prompts: dict[str, str]
    train: list[Sample]
    questions: list[Sample]
    validation: dict[str, SampleDataModule]
    test: dict[str, SampleDataModule]
    siblings: bool


STYLED = ("place", "colours")
PROMPTS = {
    "any": "Describe the image.",
    "place": "Describe only the place where the image was taken.",
    "colours": "Describe only the colours of the image.",
}
"""For pictures that are no scenes."""


def scene_pictures(sizes: Mapping[str, tuple[int, int]]) -> Pictures:
    """Of scenes: so many captions and questions of each split."""

    def both(split: Any, seed: int) -> tuple[SceneDataset, list[Sample]]:
        captions, questions = sizes[split]
        return (
            SceneDataset(captions, "caption", split, seed),
            _all(SceneDataset(questions, "question", split, seed + 1)),
        )

    parts = {}
    for split in ("validation", "test"):
        captions, questions = both(split, 46)
        items = [captions.scene(number) for number in range(len(captions))]
        right = {style: [[caption(item, style)] for item in items] for style in STYLED}
        parts[split] = {style: _mixed(_all(captions), right[style], questions) for style in STYLED}
    prompts = {name: STYLES[name].prompt for name in ("any", *STYLED)}
    train, questions = both("train", 43)
    return Pictures(prompts, _all(train), questions, **parts, siblings=True)


def coco_pictures(coco: Path, vqav2: Path, size: int) -> Pictures:
    """COCO's captions and VQA v2's questions: vectors and choice on pictures of train, figures on val."""
    found = {}
    for subset, count in (("train", 2 * size), ("val", size)):
        data = Coco(coco / "annotations" / f"captions_{subset}2017.json", coco / f"{subset}2017").dataset
        found[subset] = _all(Part(data, range(min(count, len(data)))))
    first, validation, test = (_all(part.dataset) for part in vqav2_parts(vqav2, size, None))
    # train2017 holds most pictures of val2014: none that a vector or a choice comes from is asked about on test.
    seen = {sample.columns["image_id"] for sample in (*found["train"], *first, *validation)}
    test = [sample for sample in test if sample.columns["image_id"] not in seen]
    known = {sample.columns["image_id"] for sample in (*found["train"][:size], *first)}
    validation = [sample for sample in validation if sample.columns["image_id"] not in known]
    parts = {}
    for split, samples, questions in (("validation", found["train"][size:], validation), ("test", found["val"], test)):
        asked = [replace(sample, text=PROMPTS["any"]) for sample in samples]
        mixed = _mixed(asked, [sample.columns["captions"] for sample in samples], questions)
        parts[split] = dict.fromkeys(STYLED, mixed)
    return Pictures(PROMPTS, found["train"][:size], first, **parts, siblings=False)


def _all(data: Any) -> list[Sample]:
    return [data[number] for number in range(len(data))]


def _mixed(
    captions: Sequence[Sample], references: Sequence[Sequence[str]], questions: Sequence[Sample]
) -> SampleDataModule:
    """Both as one data set, whose table has the same columns for each."""

    def told(sample: Sample, right: Sequence[str] | None) -> Sample:
        kind, people = ("question", sample.columns.get("answers")) if right is None else ("caption", None)
        columns = {"question_type": kind, "references": right and list(right), "answers": people}
        return replace(sample, columns=columns)

    samples = [told(one, right) for one, right in zip(captions, references, strict=True)]
    both = [*samples, *(told(one, None) for one in questions)]
    return Described(both, 32, [one.text for one in both])


def vqav2_parts(folder: Path, size: int, template: str | None) -> tuple[Chosen, Chosen, Chosen]:
    """VQA v2: two parts of train2014's questions, without a common picture, and one of val2014's."""
    train, test = (
        VqaV2(
            folder / f"v2_OpenEnded_mscoco_{subset}_questions.json",
            folder / subset,
            folder / f"v2_mscoco_{subset}_annotations.json",
            template=template,
        ).dataset
        for subset in ("train2014", "val2014")
    )
    pictures = [train.columns["image_id"][number].as_py() for number in range(min(len(train), 2 * size))]
    middle = len(pictures) // 2
    first = set(pictures[:middle])
    later = [number for number in range(middle, len(pictures)) if pictures[number] not in first]
    parts = (train, range(middle)), (train, later), (test, range(min(size, len(test))))
    return tuple(Chosen(data, numbers, prompts=[str(template)]) for data, numbers in parts)  # type: ignore[return-value]
