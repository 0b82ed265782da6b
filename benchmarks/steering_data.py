"""Data of the steering benchmarks: so many questions of each sort, of scenes; VQA v2 in three parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.datasets.vqav2 import VqaV2
from hooked_mm.scenes.captions import caption
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.scenes.world import Split
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


class Chosen(SampleDataModule):
    """A part of a data set as a data module."""

    def __init__(self, whole: Any, numbers: Sequence[int], batch_size: int = 64) -> None:
        super().__init__(Part(whole, numbers), batch_size)

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


class Mixed(SampleDataModule):
    """Captions under the default prompt, and questions of other scenes, of one split.

    Args:
        captions: How many.
        questions: How many, one of each scene.
        split: Of the scenes.
        style: Whose right captions stand in the column `caption_STYLE`; those of everything in `caption_full`.
        batch_size: Samples per batch.
    """

    def __init__(self, captions: int, questions: int, split: Split, style: str, batch_size: int = 32) -> None:
        one, other = SceneDataset(captions, "caption", split, 46), SceneDataset(questions, "question", split, 47)
        samples = []
        for number in range(captions):
            sample, item = one[number], one.scene(number)
            right = {f"caption_{name}": caption(item, name) for name in (style, "full")}
            samples.append(replace(sample, columns={**sample.columns, **right}))
        for number in range(questions):
            sample = other[number]
            samples.append(replace(sample, columns={**sample.columns, f"caption_{style}": None, "caption_full": None}))
        super().__init__(samples, batch_size)


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
    return Chosen(train, range(middle)), Chosen(train, later), Chosen(test, range(min(size, len(test))))
