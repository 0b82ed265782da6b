"""Scenes as a data set of samples: pictures with captions or questions, and the truth beside them."""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.scenes.captions import STYLES, right_captions
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.questions import Question, questions
from hooked_mm.scenes.world import SPLITS, Scene, Split, scene

Task = Literal["caption", "question", "questions"]


def picture(item: Scene) -> Image.Image:
    """The scene's picture."""
    return Image.fromarray(render(item)[0])


class SceneDataset(Dataset):
    """`size` scenes as samples.

    Each sample's columns hold the truth: `facts` (see `Scene.facts`), `question_type`, whether it is `held_out`, and
    per attribute the objects' values in reading order. Scenes are made when asked for, the same every time.

    Args:
        size: Number of scenes.
        task: `"caption"`: the style's prompt with the scene's caption as answer; `"question"`: one question per scene;
            `"questions"`: every question of each scene, as neighbouring samples that share one picture.
        split: `"train"`, `"validation"`, `"test"` or `"unseen"` (see `world`); small models were trained on `train`.
        seed: Another seed gives other scenes of the same split.
        style: Of the captions; `"any"` is the default prompt, with its commonest wording as answer.
        count: Only scenes with this many objects, 1 to 3.

    Raises:
        BadInputError: For a task, split, style or count that does not exist, or a negative seed or size.
    """

    def __init__(
        self,
        size: int,
        task: Task = "caption",
        split: Split = "test",
        seed: int = 0,
        style: str = "any",
        count: int | None = None,
    ) -> None:
        if size < 0 or seed < 0:
            raise BadInputError(f"size={size}, seed={seed}: neither can be negative")
        if task not in get_args(Task):
            raise BadInputError(f"task={task!r}; it must be {' or '.join(map(repr, get_args(Task)))}")
        for value, known, what in ((split, SPLITS, "split"), (style, STYLES, "style")):
            if value not in known:
                raise unknown(what, value, known)
        if count not in (None, 1, 2, 3):
            raise BadInputError(f"count={count}: scenes have 1, 2 or 3 objects")
        self.size, self.task, self.split, self.seed, self.style, self.count = size, task, split, seed, style, count
        self._last: tuple[int, Image.Image] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self.task == "questions" and self.size else self.size

    @cached_property
    def _ends(self) -> list[int]:
        """Per scene, the number of questions of it and those before it; nothing is drawn for that."""
        return list(accumulate(len(self._questions(number, self.scene(number))[0]) for number in range(self.size)))

    def _place(self, index: int) -> tuple[int, int]:
        """The scene of a sample, and which of its questions it asks (0 where it asks one)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if self.task != "questions":
            return index, 0
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def ids(self) -> list[str]:
        """The samples' ids, in order."""
        return [self._id(*self._place(index)) for index in range(len(self))]

    def _id(self, number: int, asked: int) -> str:
        kind = "" if self.count is None else f"-of-{self.count}"
        which = f"-{asked:02d}" if self.task == "questions" else ""
        return f"{self.split}-{self.seed}{kind}-{number:06d}{which}"

    def scene(self, index: int) -> Scene:
        """Scene number `index`."""
        if not 0 <= index < self.size:
            raise IndexError(f"scene {index} of {self.size}")
        return scene(self.split, index, self.seed, count=self.count)

    def shown(self, index: int) -> Scene:
        """The scene of a sample, which samples share where every question is asked."""
        return self.scene(self._place(index)[0])

    def _questions(self, number: int, item: Scene) -> tuple[list[Question], np.random.Generator]:
        """The questions of a scene, and what then draws one of them."""
        rng = np.random.default_rng([SPLITS.index(self.split), self.seed, number, 1])
        return questions(item, rng), rng

    def asked(self, index: int) -> Question:
        """The question of a sample, without its picture being drawn.

        Raises:
            BadInputError: If the samples are captions.
        """
        if self.task == "caption":
            raise BadInputError("these samples are captions; questions are asked with task='question' or 'questions'")
        number, which = self._place(index)
        options, rng = self._questions(number, self.scene(number))
        return options[which if self.task == "questions" else rng.integers(len(options))]

    def _picture(self, number: int, item: Scene) -> Image.Image:
        """Drawn once for samples that follow each other: one object, by which extraction knows what they share."""
        if self._last is None or self._last[0] != number:
            self._last = (number, picture(item))
        return self._last[1]

    def __getitem__(self, index: int) -> Sample:
        number, asked = self._place(index)
        item = self.scene(number)
        text, answer, kind = STYLES[self.style].prompt, right_captions(item, self.style)[0], "caption"
        if self.task != "caption":
            options, rng = self._questions(number, item)
            chosen = options[asked if self.task == "questions" else rng.integers(len(options))]
            text, answer, kind = chosen.text, chosen.answer, chosen.type
        columns = {
            "question_type": kind,
            "facts": sorted(item.facts()),
            "place": item.place,
            "held_out": item.held_out,
            **{name: [getattr(o, name) for o in item.objects] for name in ("shape", "colour", "size", "position")},
        }
        drawn = self._picture(number, item) if self.task == "questions" else picture(item)
        return Sample(self._id(number, asked), drawn, text, answer, columns)


class ScenesDataModule(SampleDataModule):
    """Scenes for `Trainer.predict`; the arguments are those of `SceneDataset` and `SampleDataModule`."""

    def __init__(
        self,
        size: int = 1000,
        task: Task = "caption",
        split: Split = "test",
        seed: int = 0,
        style: str = "any",
        count: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        self.scenes = SceneDataset(size, task, split, seed, style, count)
        super().__init__(self.scenes, batch_size, num_workers)

    def describe(self) -> dict[str, Any]:
        """Which scenes."""
        data = self.scenes
        own = {name: getattr(data, name) for name in ("task", "split", "seed", "style", "count")}
        return {**super().describe(), **own}
