"""Sheets of pictures with maps over them: segmentations beside the truth, receptive fields of neurons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from analyses.neurons import POINT, Neuron, receptive_fields
from analyses.segmentation import Case, Setting, over_layers
from hooked_mm.drawing import enlarge, grid, overlay, titled
from hooked_mm.frames import frame
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset, picture

SIDE = 160


def outlined(image: Image.Image, mask: Bool[Tensor, "height width"], side: int = SIDE) -> Image.Image:
    """A picture, enlarged, with the rim of a mask in magenta."""
    large = enlarge(image.convert("RGB"), side)
    wide = Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(large.size, Image.Resampling.NEAREST)
    inside = np.pad(np.asarray(wide) > 127, 1)
    core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    pixels = np.array(large)
    pixels[inside[1:-1, 1:-1] & ~core] = (255, 0, 200)
    return Image.fromarray(pixels)


def segmentation_sheet(
    data: SceneDataset, parts: Sequence[tuple[Sequence[Case], Sequence[int], Setting]], count: int = 4
) -> Image.Image:
    """For some words of scenes: the picture with the truth outlined, the map, and what is chosen.

    Args:
        data: The scenes; a case's `picture` is the scene's number.
        parts: Cases, the layers of their maps, and the setting; a column of three pictures each.
        count: Cases of each, those of different pictures.
    """
    columns: list[list[Image.Image]] = []
    for cases, numbers, setting in parts:
        column = []
        # Of each of the first scenes one word, so that a word's share of the sheet is that of the data.
        for case in list({case.picture: case for case in reversed(cases)}.values())[::-1][:count]:
            image = picture(data.scene(case.picture))
            values = over_layers(case.grid[..., None], numbers, setting.layers)[..., 0]
            chosen = setting.threshold.choose(case.pixels(numbers, setting.layers))
            drawn = (
                outlined(image, case.mask),
                overlay(image, values.numpy(), case.box, side=SIDE),
                outlined(image, chosen),
            )
            names = (f"{case.word}: truth", f"most {float(values.nan_to_num(nan=0).max()):.2f}", "chosen")
            column.append([titled(one, name, SIDE) for one, name in zip(drawn, names, strict=True)])
        columns += [[row[place] for row in column] for place in range(3)]
    rows = [one for row in zip(*columns, strict=False) for one in row]
    return grid(rows, len(columns), side=SIDE + 30, gap=4)


def neuron_sheet(
    model: HookedMM,
    images: Sequence[Image.Image],
    neurons: Sequence[Neuron],
    text: str = "describe the scene .",
    count: int = 5,
    names: Sequence[str] = (),
) -> Image.Image:
    """Per neuron a row: the pictures in which it is most active at a patch, with its activity over them.

    Args:
        model: The model.
        images: To choose from.
        neurons: Whose receptive fields.
        text: The prompt.
        count: Pictures per neuron.
        names: What to write over each neuron's pictures; its layer and number unless given.
    """
    points = [POINT.format(layer) for layer in dict.fromkeys(neuron.layer for neuron in neurons)]
    _, cache = model.run_with_cache(model.prepare(list(images), text), points)
    fields = [receptive_fields(cache, neurons, sample)[0] for sample in range(len(images))]
    drawn = []
    for place, neuron in enumerate(neurons):
        own = [field[..., place].abs().nan_to_num() for field in fields]
        best = torch.tensor([float(field.max()) for field in own]).argsort(descending=True)[:count].tolist()
        peak = float(own[best[0]].max())
        for sample in best:
            values = fields[sample][..., place]
            box = frame(model, images[sample], (values.shape[0], values.shape[1]))
            name = names[place] if names else f"{neuron.layer}.{neuron.number}"
            shown = overlay(images[sample], values.float().numpy(), box, peak or 1.0, SIDE)
            drawn.append(titled(shown, name if sample == best[0] else "", SIDE))
    return grid(drawn, count, side=SIDE + 30, gap=4)
