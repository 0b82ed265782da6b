"""Scenes as a data set of samples: pictures with captions or questions, and the truth beside them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.language import CAPTION_PROMPT, caption, questions
from hooked_mm.scenes.world import Scene, scene

SPLIT_SEEDS = {"train": 1000, "validation": 2000, "test": 3000}
"""First seed of each split; a data set's own seed is added. Scenes of different splits never share a seed."""

Task = Literal["caption", "question"]


def picture(item: Scene) -> Image.Image:
    """The scene's picture."""
    return Image.fromarray(render(item)[0])


class SceneDataset(Dataset):
    """`size` scenes as samples.

    Each sample's columns hold the truth: `facts` (see `Scene.facts`), the `question_type`, and per attribute the
    objects' values in reading order. Scenes are made when asked for, the same every time.

    Args:
        size: Number of samples.
        task: `"caption"`: the caption prompt with the scene's caption as answer; `"question"`: one question per scene.
        split: `"train"`, `"validation"` or `"test"`; the shipped models were trained on `train`.
        seed: Another seed gives other scenes of the same split, 0 to 999.
        two_objects: The share of scenes with two objects.
    """

    def __init__(
        self, size: int, task: Task = "caption", split: str = "test", seed: int = 0, two_objects: float = 0.7
    ) -> None:
        if split not in SPLIT_SEEDS or not 0 <= seed < 1000:
            raise BadInputError(f"split={split!r}, seed={seed}: splits are {', '.join(SPLIT_SEEDS)}, seeds 0 to 999")
        if task not in ("caption", "question"):
            raise BadInputError(f"task={task!r}; it must be 'caption' or 'question'")
        self.size, self.task, self.split, self.seed, self.two_objects = size, task, split, seed, two_objects

    def __len__(self) -> int:
        return self.size

    def ids(self) -> list[str]:
        """The samples' ids, in order."""
        return [f"{self.split}-{self.seed}-{index:06d}" for index in range(self.size)]

    def scene(self, index: int) -> Scene:
        """Scene number `index`."""
        if not 0 <= index < self.size:
            raise IndexError(f"scene {index} of {self.size}")
        return scene(SPLIT_SEEDS[self.split] + self.seed, index, two_objects=self.two_objects)

    def __getitem__(self, index: int) -> Sample:
        item = self.scene(index)
        text, answer, kind = CAPTION_PROMPT, caption(item), "caption"
        if self.task == "question":
            rng = np.random.default_rng([SPLIT_SEEDS[self.split] + self.seed, index, 1])
            options = questions(item, rng)
            chosen = options[rng.integers(len(options))]
            text, answer, kind = chosen.text, chosen.answer, chosen.type
        columns = {
            "question_type": kind,
            "facts": sorted(item.facts()),
            "place": item.place,
            **{name: [getattr(o, name) for o in item.objects] for name in ("shape", "colour", "size", "position")},
        }
        name = f"{self.split}-{self.seed}-{index:06d}"
        return Sample(name, picture(item), text, answer, columns)


class ScenesDataModule(SampleDataModule):
    """Scenes for `Trainer.predict`; the arguments are those of `SceneDataset` and `SampleDataModule`."""

    def __init__(
        self,
        size: int = 1000,
        task: Task = "caption",
        split: str = "test",
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        self.scenes = SceneDataset(size, task, split, seed)
        super().__init__(self.scenes, batch_size, num_workers)

    def describe(self) -> dict[str, Any]:
        """Which scenes."""
        data = self.scenes
        return {**super().describe(), "task": data.task, "split": data.split, "seed": data.seed}
