"""Pictures to train on, with the truth about every part of them: scenes rendered once, through the real processor.

Scenes of one canvas lie together, so that a batch has pictures of one size: as many patches, as many tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from hooked_mm.scenes.draw import render
from hooked_mm.scenes.language import WORD_CLASSES
from hooked_mm.scenes.world import CANVASES, HELD_OUT, HELD_OUT_SHAPE, Scene, scene
from hooked_mm.small.family import Family, Pixels
from hooked_mm.small.labels import IGNORE, Labels

Batch = tuple[str, np.ndarray, list[int]]


def partner_words() -> dict[str, Int[Tensor, " words"]]:
    """For every shape the index of its held-out colour, for every colour that of its held-out shape; else IGNORE.

    Training leaves the partner out of every softmax: that a ring is green is never shown, but neither is it denied.
    """
    shapes, colours = WORD_CLASSES["shapes"], WORD_CLASSES["colours"]
    of_shape = [colours.index(HELD_OUT[shape]) if shape in HELD_OUT else IGNORE for shape in shapes]
    of_colour = [shapes.index(HELD_OUT_SHAPE[colour]) if colour in HELD_OUT_SHAPE else IGNORE for colour in colours]
    return {"colours": torch.tensor(of_shape), "shapes": torch.tensor(of_colour)}


@dataclass(frozen=True)
class Group:
    """The scenes of one canvas: their pictures as a pool keeps them (half precision), the truth of patches and tokens.

    `grey`: which are to be shown without colour while the tower learns (shapes must not be guessed from colours).
    """

    scenes: list[Scene]
    pixels: Pixels
    patches: Labels
    tokens: Labels
    grey: Tensor
    prompt: Mapping[str, Tensor]


class Pool:
    """The scenes a process trains on; they are drawn when first asked for.

    Args:
        family: Whose pictures.
        processor: The family's.
        scenes: (split, seed, index) of each.
        grey: The share of pictures shown without colour where that is wanted.
    """

    def __init__(self, family: Family, processor: Any, scenes: list[tuple[str, int, int]], grey: float = 1 / 3) -> None:
        self.family, self.processor, self.scenes, self.grey = family, processor, scenes, grey

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The scenes by canvas."""
        by_canvas: dict[str, list[tuple[Scene, int]]] = {f"{width} x {height}": [] for width, height in CANVASES}
        for split, seed, index in self.scenes:
            item = scene(split, index, seed)
            by_canvas[f"{item.width} x {item.height}"].append((item, index))
        return {
            canvas: _group(self.family, self.processor, items, self.grey)
            for canvas, items in by_canvas.items()
            if items
        }

    def batches(self, size: int, steps: int, seed: list[int]) -> Iterator[Batch]:
        """Random batches of one canvas each: which canvas, the rows of its group, and a seed of their own."""
        rng = np.random.default_rng(seed)
        canvases, groups = list(self.groups), list(self.groups.values())
        shares = np.array([len(group.scenes) for group in groups], float)
        left = [np.empty(0, np.int64) for _ in groups]
        for step in range(steps):
            number = int(rng.choice(len(groups), p=shares / shares.sum()))
            while len(left[number]) < size:
                left[number] = np.concatenate([left[number], rng.permutation(len(groups[number].scenes))])
            rows, left[number] = left[number][:size], left[number][size:]
            yield canvases[number], rows, [*seed, step]

    def pictures(self, group: Group, rows: np.ndarray, *, some_grey: bool) -> Pixels:
        """The forward tensors of some pictures, where wanted with the chosen ones in grey."""
        pixels = group.pixels
        if some_grey:
            values = pixels["pixel_values"][rows].float()
            grey = group.grey[rows]
            values[grey] = self.family.grey(values[grey])
            return self.family.join({**pixels, "pixel_values": values}, slice(None))
        return self.family.join(pixels, rows)


def _group(family: Family, processor: Any, items: list[tuple[Scene, int]], grey: float) -> Group:
    values: list[Tensor] = []
    patches: list[Labels] = []
    tokens: list[Labels] = []
    for item, _ in items:
        picture, masks = render(item)
        made = family.pixels(processor, Image.fromarray(picture))
        values.append(made["pixel_values"].half())
        for found, labels in zip((patches, tokens), family.labels(processor, item, masks), strict=True):
            found.append(labels)
    pixels = {**made, "pixel_values": torch.stack(values)}
    blank = [{"role": "user", "content": [{"type": "image"}]}]
    text = processor.apply_chat_template(blank, add_generation_prompt=False)
    prompt = processor(text=[text], images=[[Image.fromarray(picture)]], return_tensors="pt")
    return Group(
        scenes=[item for item, _ in items],
        pixels=pixels,
        patches={name: torch.stack([labels[name] for labels in patches]) for name in patches[0]},
        tokens={name: torch.stack([labels[name] for labels in tokens]) for name in tokens[0]},
        # By the scene's own number, so that it does not depend on how scenes are dealt out to processes.
        grey=torch.tensor([np.random.default_rng([index, 7]).random() < grey for _, index in items]),
        prompt={"input_ids": prompt["input_ids"], **{k: v for k, v in prompt.items() if k == "image_grid_thw"}},
    )
