"""Where in a picture the model would say a word: segmentation by the logit lens, against masks that are known.

    hooked-mm analyse segment --model.id small:llava --data.split test --data.size 200 \\
        --validation.split validation --validation.size 100 --word_classes '[shapes, colours]' --output runs/segment

Data are scenes, whose masks are known. Layers and threshold are chosen on the validation scenes, scores are of the
others, means over pictures with bootstrap intervals over pictures; beside them a box in the middle as large as an
object is on average, the masks themselves as coarse as patches, and the same model with random weights. Writes
`pictures.png`, and the hallucination score's AUROC.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.frame import finish, new_parser, parsed
from analyses.hallucination import clustered_auroc, hallucination_scores
from analyses.map_pictures import segmentation_sheet
from analyses.model_samples import loaded
from analyses.patch_maps import covers
from analyses.result import Result, Score
from analyses.segmentation import Case, Setting, best_setting, first_tokens, scored, word_maps
from hooked_mm.errors import BadInputError
from hooked_mm.frames import frame
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import bootstrap
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.dataset import SceneDataset, ScenesDataModule, picture
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.language import WORD_CLASSES
from hooked_mm.scenes.world import Scene
from hooked_mm.untrained import untrained_copy

NAMED = {"shapes": "shape", "colours": "colour"}
"""Class of words -> the attribute of objects that its words name."""


@dataclass
class Maps:
    """What the lens sees of a class of words in scenes.

    Attributes:
        cases: A map and a mask for every word that is true of a picture.
        layers: Numbers of the layers.
        confidence: (pictures, words), the largest probability anywhere.
        present: (pictures, words), whether the picture shows what the word names.
    """

    cases: list[Case]
    layers: list[int]
    confidence: Float[Tensor, "n w"]
    present: Bool[Tensor, "n w"]


def object_masks(item: Scene, attribute: str) -> dict[str, Bool[Tensor, "height width"]]:
    """The pixels of all objects of a scene that a word names, per word; without words that have no pixel."""
    masks = render(item)[1]
    names = [getattr(thing, attribute) for thing in item.objects]
    found = {name: covers(masks[[other == name for other in names]].max(axis=0)) for name in dict.fromkeys(names)}
    return {name: mask for name, mask in found.items() if bool(mask.any())}


def in_parts(data: SceneDataset, size: int) -> Iterator[list[Scene]]:
    """The scenes, so many at a time."""
    for start in range(0, data.size, size):
        yield [data.scene(number) for number in range(start, min(start + size, data.size))]


def lens_maps(model: HookedMM, data: SceneDataset, word_class: str, size: int = 32) -> Maps:
    """What the lens sees of a class of words, in all scenes."""
    words = WORD_CLASSES[word_class]
    ids, _ = first_tokens(model.tokenizer, words)
    cases: list[Case] = []
    layers: list[int] = []
    confidence, present = [], []
    for items in in_parts(data, size):
        pictures = [picture(item) for item in items]
        maps = word_maps(model, model.prepare(pictures, data[0].text), ids)
        layers = maps.layers
        confidence.append(maps.confidence())
        for number, item in enumerate(items):
            (grid,) = maps.grids(number)
            box = frame(model, pictures[number], (grid.shape[0], grid.shape[1]))
            masks = object_masks(item, NAMED[word_class])
            present.append([word in masks for word in words])
            where = sum(map(len, confidence[:-1])) + number
            cases += [Case(where, word, grid[..., words.index(word)], box, mask) for word, mask in masks.items()]
    return Maps(cases, layers, torch.cat(confidence), torch.tensor(present))


def by_picture(values: Float[Tensor, " cases"], cases: Sequence[Case], count: int) -> Float[Tensor, " pictures"]:
    """Means over the words of each picture; NaN for a picture without any."""
    own = torch.tensor([case.picture for case in cases])
    sums = own.bincount(values.double(), minlength=count)
    return sums / own.bincount(minlength=count)


def evaluate(model: HookedMM, made: Any, word_class: str, name: str) -> tuple[list[Score], list[str], Maps, Setting]:
    """All scores of a model for a class of words, with what a reader must know; the test scenes' maps."""
    known = lens_maps(model, made.validation.scenes, word_class)
    setting, reached = best_setting(known.cases, known.layers)
    share = float(torch.stack([case.mask.double().mean() for case in known.cases]).mean())
    maps = lens_maps(model, made.data.scenes, word_class)
    count = len(maps.present)
    about = {"rows": len(maps.cases), "samples": count}
    notes = [
        f"{name}, {word_class}: layer {setting.layers}, threshold {setting.threshold} (mean IoU {reached:.3f} on "
        "validation scenes)"
    ]
    found: list[Score] = []

    def add(what: str, layer: int | None, values: Tensor) -> None:
        band = bootstrap(by_picture(values, maps.cases, count), draws=made.draws, seed=made.seed)
        value, low, high = (float(end) for end in band)
        found.append(Score(f"{word_class}: {what}", "image", layer, value, low, high, **about))

    best = scored(maps.cases, maps.layers, setting, share)
    for what, values in best.items():
        add(what, None, values)
    for layer in maps.layers:
        own = scored(maps.cases, maps.layers, Setting(layer, setting.threshold), share)
        add("pixel AUROC over layers", layer, own["pixel AUROC"])
        add("IoU over layers", layer, own["IoU"])
    told = clustered_auroc(hallucination_scores(maps.confidence), ~maps.present, draws=made.draws, seed=made.seed)
    found.append(Score(f"{word_class}: AUROC of the hallucination score", "image", None, *told, **about))
    return found, notes, maps, setting


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse segment`."""
    parser = new_parser("segment", __doc__)
    parser.add_argument("--model", type=ModelSource, required=True, help="the model to look into")
    parser.add_class_arguments(ScenesDataModule, "data", help="scenes to score on")
    parser.add_class_arguments(ScenesDataModule, "validation", help="scenes to choose layers and threshold on")
    parser.set_defaults({"data.size": 200, "validation.size": 100, "validation.split": "validation"})
    parser.add_argument("--word_classes", type=list[str], default=list(NAMED), help="shapes, colours")
    parser.add_argument("--random_weights", type=int | None, default=0, help="seed of the control; null for none")
    parser.add_argument("--device", type=str, default="cpu", help="where the model runs: cuda, cuda:1, ...")
    parser.add_argument("--name", type=str | None, help="what to call the model in tables and plots")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap, over pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    made = parsed(parser, argv)
    if unknown := [name for name in made.word_classes if name not in NAMED]:
        raise BadInputError(f"objects of scenes have no word class {unknown[0]!r}; take some of {list(NAMED)}")
    if made.data.scenes.split == made.validation.scenes.split and made.data.scenes.seed == made.validation.scenes.seed:
        raise BadInputError(
            f"data and validation are both scenes of split {made.data.scenes.split!r} and seed "
            f"{made.data.scenes.seed}; choose another split or seed for one of them"
        )
    model = loaded(made)
    name = made.name or made.model.name
    settings = {key: made[key] for key in ("word_classes", "random_weights", "draws", "seed")}
    settings |= {"data": made.data.describe(), "validation": made.validation.describe()}
    result = Result("segment", name, [], settings)
    sheets = []
    for word_class in made.word_classes:
        scores, notes, maps, setting = evaluate(model, made, word_class, name)
        result.scores += scores
        result.notes += notes
        sheets.append((maps.cases, maps.layers, setting))
    segmentation_sheet(made.data.scenes, sheets).save(made.output / "pictures.png")
    finish(result, made.output)
    if made.random_weights is not None:
        control = untrained_copy(model, made.random_weights)
        other = Result("segment", f"{name}, random weights", [], settings)
        for word_class in made.word_classes:
            scores, notes, _, _ = evaluate(control, made, word_class, other.model)
            other.scores += scores
            other.notes += notes
        finish(other, made.output / "random weights")
