"""Pairs of pictures with one question and two answers: where they come from.

Scenes make them (one attribute of one object changed, `hooked_mm.scenes.pairs`), MMVP has them (one question, opposite
answers), or anybody's own two pictures are one. How a model sees them is in `pair_batches`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError
from hooked_mm.prepare import ImageSource, load_image
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.pairs import ScenePair, scene_pair
from hooked_mm.scenes.questions import ASKED
from hooked_mm.scenes.world import Scene, SceneObject

CHANGED = 16
"""Of 255: by how much a pixel's colour differs between two pictures of one's own that are not the same there; less is
what saving as JPEG does."""


@dataclass(frozen=True)
class ImagePair:
    """Two pictures, a question, and the right answer in each.

    Attributes:
        id: What to call it.
        clean: The picture of the first answer.
        corrupt: The picture of the second.
        question: Asked of both.
        answers: The right answers, for `clean` and for `corrupt`.
        mask: The pixels in which the pictures differ; None if not known.
        subject: Words of the question that name what differs, if it names it.
    """

    id: str
    clean: ImageSource
    corrupt: ImageSource
    question: str
    answers: tuple[str, str]
    mask: Bool[Tensor, "height width"] | None = None
    subject: str | None = None


def as_pair(made: ScenePair, name: str) -> ImagePair:
    """A pair of scenes; its mask is where the changed object is in either picture."""
    masks = [_mask(scene, thing) for scene, thing in zip((made.one, made.other), made.items, strict=True)]
    known = [mask for mask in masks if mask is not None]
    mask = None if not known or made.index is None else torch.stack(known).any(0)
    return ImagePair(name, picture(made.one), picture(made.other), made.question, made.answers, mask, _subject(made))


def _mask(scene: Scene, thing: SceneObject | None) -> Bool[Tensor, "height width"] | None:
    """The pixels that an object covers at all."""
    if thing is None or thing not in scene.objects:
        return None
    return torch.from_numpy(render(scene)[1][scene.objects.index(thing)] > 0)


def _subject(made: ScenePair) -> str | None:
    """The phrase of the question that names the object."""
    if made.attribute not in ASKED:
        return None
    before, after = (re.escape(part) for part in ASKED[made.attribute][1].split("{}"))
    found = re.fullmatch(f"{before}(.+){after}", made.question)
    return None if found is None else found[1].removeprefix("the ")


def own_pair(clean: ImageSource, corrupt: ImageSource, question: str, answers: tuple[str, str]) -> ImagePair:
    """A pair of anybody's pictures; where they differ (by more than `CHANGED`) is known if they are of one size."""
    one, other = load_image(clean).convert("RGB"), load_image(corrupt).convert("RGB")
    mask = None
    if one.size == other.size:
        apart = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
        mask = torch.from_numpy((apart > CHANGED).any(axis=2))
    return ImagePair("own", one, other, question, answers, mask)


def scene_pairs(
    attribute: str, count: int, split: str = "test", seed: int = 0, *, objects: int | None = None
) -> list[ImagePair]:
    """Pairs of scenes that differ in one attribute: `colour`, `shape`, `size`, `position`, `place` or `count`.

    Args:
        attribute: What differs.
        count: How many pairs.
        split: Of the scenes.
        seed: Another seed gives other pairs.
        objects: Only scenes with so many objects.

    Raises:
        BadInputError: For an unknown attribute or split, or a count below 1.
    """
    if count < 1:
        raise BadInputError(f"count={count} pairs; make at least one")
    return [
        as_pair(scene_pair(split, index, attribute, seed, count=objects), f"{split}-{seed}-{attribute}-{index:04d}")
        for index in range(count)
    ]


def mmvp_pairs(samples: Sequence[Sample]) -> tuple[list[ImagePair], list[str]]:
    """Pairs of MMVP's samples with one question and two answers; and notes on those that are none.

    Args:
        samples: Of `hooked_mm.datasets.mmvp.Mmvp`, whole pairs, in any order.

    Raises:
        BadInputError: If half of a pair is missing.
    """
    by_pair: dict[int, list[Sample]] = {}
    for sample in samples:
        by_pair.setdefault(int(sample.columns["pair"]), []).append(sample)
    made, reasons = [], Counter[str]()
    for number, both in sorted(by_pair.items()):
        if len(both) != 2:
            raise BadInputError(f"{len(both)} samples of MMVP's pair {number} are there; choose whole pairs")
        first, second = sorted(both, key=lambda sample: int(sample.columns["index"]))
        if first.text != second.text:
            reasons["the questions or their options differ"] += 1
        elif first.answer == second.answer:
            reasons["both answers are the same"] += 1
        else:
            answers = (str(first.answer), str(second.answer))
            made.append(ImagePair(f"mmvp-{number}", _one_picture(first), _one_picture(second), first.text, answers))
    return made, [f"{count} pairs of MMVP were left out: {why}" for why, count in reasons.items()]


def _one_picture(sample: Sample) -> ImageSource:
    images = sample.images
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        if len(images) != 1:
            raise BadInputError(f"sample {sample.id!r} has {len(images)} pictures; a pair needs one on each side")
        return images[0]
    if images is None:
        raise BadInputError(f"sample {sample.id!r} has no picture")
    return images
