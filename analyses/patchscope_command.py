"""Patchscopes on scenes: does the model, given an image patch in the place of a word, say what the patch shows?

    hooked-mm analyse patchscope --model.id small:llava --data.size 100 --output runs/patchscope

The stream at a patch that one object covers most, behind each layer, is put into a question without a picture, in the
place of the word "object"; the answer is compared with the object's colour or shape. Beside it the same with a patch
drawn at random from the same picture. Means over pictures with bootstrap intervals; `reads.csv` has every answer.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from analyses.frame import finish, new_parser, parsed
from analyses.logit_lens import lens_points
from analyses.model_samples import loaded
from analyses.patch_maps import covers
from analyses.patchscope import Source, patchscope, word_target
from analyses.result import Result, Score
from analyses.segment_command import in_parts
from analyses.segmentation import Case, patch_shares
from hooked_mm.errors import BadInputError
from hooked_mm.frames import frame
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import bootstrap
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.dataset import ScenesDataModule, picture
from hooked_mm.scenes.draw import render

QUESTIONS = {"colour": "what colour is the object ?", "shape": "what shape is the object ?"}
"""Attribute -> target."""

PLACEHOLDER, KINDS = "object", ("its patch", "a random patch")


@dataclass(frozen=True)
class Asked:
    """A patch that is read.

    Attributes:
        picture: Number of the scene.
        truth: Attribute -> value, of the object.
        kind: `its patch`: that the object covers most; `a random patch`.
        source: Where its representation is, within a batch; the layer is filled in later.
    """

    picture: int
    truth: dict[str, str]
    kind: str
    source: Source


def asked_of(model: HookedMM, items: Sequence[Any], first: int, share: float, rng: np.random.Generator) -> list[Asked]:
    """Of every object that covers so much of a patch that patch, and one at random of the same picture."""
    pictures = [picture(item) for item in items]
    batch = model.prepare(pictures, QUESTIONS["colour"])
    found = []
    for number, (item, image) in enumerate(zip(items, pictures, strict=True)):
        (index,) = (batch.layout.image_sample == number).nonzero()[:, 0].tolist()
        if (grid := batch.layout.images[index].grid) is None:
            raise BadInputError(f"the image positions of this model have no places in the picture: {batch.layout.why}")
        places = grid[grid >= 0].tolist()
        box = frame(model, image, (grid.shape[0], grid.shape[1]))
        for thing, mask in zip(item.objects, render(item)[1], strict=True):
            shares = patch_shares(Case(number, "", torch.zeros(*grid.shape, 1), box, covers(mask)))
            shares = shares.masked_fill(grid.cpu() < 0, 0)
            if float(shares.max()) < share:
                continue
            truth = {name: str(getattr(thing, name)) for name in QUESTIONS}
            best = int(grid.flatten()[int(shares.argmax())])
            for kind, place in zip(KINDS, (best, places[int(rng.integers(len(places)))]), strict=True):
                found.append(Asked(first + number, truth, kind, Source(number, place, 0)))
    return found


def reads(
    model: HookedMM, data: ScenesDataModule, layers: Sequence[int], to: int | None, share: float, seed: int
) -> Iterator[tuple[Asked, int, str, str]]:
    """(what was asked of, its layer, the attribute, what the model said), for all scenes."""
    targets = {name: word_target(model, text, PLACEHOLDER) for name, text in QUESTIONS.items()}
    points, rng, first = lens_points(model.hook_names, layers=layers), np.random.default_rng(seed), 0
    for items in in_parts(data.scenes, data.batch_size):
        asked = asked_of(model, items, first, share, rng)
        first += len(items)
        batch = model.prepare([picture(item) for item in items], QUESTIONS["colour"])
        with torch.no_grad():
            _, cache = model.run_with_cache(batch, list(points.values()), stop_at_layer=max(1, *points))
        for layer in points:
            sources = [Source(one.source.sample, one.source.position, layer) for one in asked]
            for name, target in targets.items():
                said = patchscope(model, cache, sources, target, to)
                yield from zip(asked, [layer] * len(asked), [name] * len(asked), said, strict=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse patchscope`."""
    parser = new_parser("patchscope", __doc__)
    parser.add_argument("--model", type=ModelSource, required=True, help="the model to look into")
    parser.add_class_arguments(ScenesDataModule, "data", help="scenes to read patches of")
    parser.set_defaults({"data.size": 100})
    parser.add_argument("--layers", type=list[int] | None, help="of the source; all but the last unless given")
    parser.add_argument("--target_layer", type=int | None, help="of the target; the source's own unless given")
    parser.add_argument("--share", type=float, default=0.6, help="of a patch that an object must cover")
    parser.add_argument("--device", type=str, default="cpu", help="where the model runs: cuda, cuda:1, ...")
    parser.add_argument("--name", type=str | None, help="what to call the model in tables and plots")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap, over pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the random patches and the bootstrap")
    made = parsed(parser, argv)
    model = loaded(made)
    # Behind the last block nothing reads what a prompt's position holds but the position itself.
    layers = list(range(model.cfg.n_layers)) if made.layers is None else made.layers
    rows = list(reads(model, made.data, layers, made.target_layer, made.share, made.seed))
    if not rows:
        raise BadInputError(f"no object covers {made.share} of a patch; take more scenes, or a smaller share")
    names = ("layers", "target_layer", "share", "draws", "seed")
    result = Result("patchscope", made.name or made.model.name, [], {name: made[name] for name in names})
    with open(made.output / "reads.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "patch", "layer", "attribute", "truth", "said"])
        writer.writerows([one.picture, one.kind, layer, name, one.truth[name], said] for one, layer, name, said in rows)
    for name in QUESTIONS:
        for kind in KINDS:
            for layer in dict.fromkeys(layer for _, layer, _, _ in rows):
                own = [(one, said) for one, at, what, said in rows if (at, what, one.kind) == (layer, name, kind)]
                result.scores.append(_score(own, name, kind, layer, made))
    finish(result, made.output)


def _score(own: Sequence[tuple[Asked, str]], name: str, kind: str, layer: int, made: Any) -> Score:
    """How often the first word said is the truth, a mean over pictures of the mean within each."""
    right: dict[int, list[bool]] = {}
    for one, said in own:
        right.setdefault(one.picture, []).append(said.split()[:1] == [one.truth[name]])
    means = torch.tensor([sum(values) / len(values) for values in right.values()], dtype=torch.float64)
    band = bootstrap(means, draws=max(1, made.draws), seed=made.seed)
    value, low, high = (float(end) for end in band)
    ends = (low, high) if made.draws else (math.nan, math.nan)
    return Score(f"{name} read from {kind}", "image", layer, value, *ends, rows=len(own), samples=len(means))
