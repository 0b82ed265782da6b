"""How faithful attribution methods are: each against the object that is asked for, and against the model's own answer.

    hooked-mm analyse faithfulness --model.id small:llava --size 100 --output runs/faithfulness

Questions about one attribute of one object of a scene (`hooked_mm.scenes.pairs`), whose mask is known; those that the
model answers wrongly are left out and counted. With `--only_right false` they stay, and it is the right answer that is
explained: so can a model of random weights be held beside (Adebayo et al. 2018, arXiv 1810.03292). Writes
`faithfulness.csv`, a row per method and the controls, and pictures of the first samples beside each other.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from analyses.attribution_methods import METHODS, Case, Maps, attribution, case, scores
from analyses.faithfulness import coarsened, deletion_and_insertion, from_centre, located
from analyses.frame import new_parser, parsed
from analyses.gallery import Entry, write_gallery
from analyses.map_overlay import blended, told
from analyses.model_samples import loaded
from analyses.patch_maps import covers, on_picture
from analyses.picture_maps import on_pixels
from analyses.result import Result, Score
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.frames import frame
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import bootstrap
from hooked_mm.reader import ModelSource
from hooked_mm.run_output import text_columns
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.pairs import ATTRIBUTES, ScenePair, scene_pair
from hooked_mm.scenes.world import SPLITS

MEASURES = ("pixel AUROC", "share of ideal", "among objects", "IoU", "deletion", "insertion")
CONTROLS = ("ideal", "centre", "random")


@dataclass(frozen=True)
class Asked:
    """A question about one object.

    Attributes:
        title: Question and answer.
        image: The picture.
        mask: The object's pixels.
        others: Those of the other objects; None if there are none.
    """

    title: str
    image: Image.Image
    mask: Bool[Tensor, "height width"]
    others: Bool[Tensor, "height width"] | None


@dataclass
class Found:
    """Scores of all methods, sample by sample.

    Attributes:
        values: Method -> measure -> one number per sample.
        wrong: Questions that the model answers wrongly.
        refused: Method -> why it can't be had of this model.
        shown: For pictures: the question, and method -> map over pixels.
    """

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    wrong: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    shown: list[tuple[Asked, dict[str, Float[Tensor, "height width"]]]] = field(default_factory=list)

    def add(self, method: str, values: Sequence[float]) -> None:
        """One sample's numbers, as `MEASURES`."""
        own = self.values.setdefault(method, {name: [] for name in MEASURES})
        for name, value in zip(MEASURES, values, strict=True):
            own[name].append(value)


def asked_of(pair: ScenePair) -> Asked:
    """The question of a pair about its first scene.

    Raises:
        BadInputError: If it asks for no object.
    """
    if pair.index is None:
        raise BadInputError(f"{pair.question!r} asks for no object, so no map can find one; take another attribute")
    masks = render(pair.one)[1]
    rest = [number for number in range(len(masks)) if number != pair.index]
    own = covers(masks[pair.index])
    others = covers(masks[rest].max(axis=0)) & ~own if rest else None
    return Asked(f"{pair.question} {pair.answers[0]}", picture(pair.one), own, others)


def cases(
    model: HookedMM, pairs: Sequence[ScenePair], size: int, found: Found, only_right: bool = True
) -> Iterator[tuple[list[Asked], Case]]:
    """Questions that the model answers rightly, or all, so many at a time; wrong answers are counted."""
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        images = [picture(pair.one) for pair in part]
        batch = model.prepare([[image] for image in images], [pair.question for pair in part])
        out = model.generate(batch, 8)
        words = [model.tokenizer(pair.answers[0], add_special_tokens=False)["input_ids"][0] for pair in part]
        right = [text.strip() == pair.answers[0] for pair, text in zip(part, out.text, strict=True)]
        found.wrong += right.count(False)
        # A right answer is explained by the token that was said: some tokenizers begin a word in two ways.
        first = [int(out.tokens[n, 0]) if right[n] else word for n, word in enumerate(words)]
        kept = [n for n in range(len(part)) if right[n] or not only_right]
        if kept:
            asked = [asked_of(part[n]) for n in kept]
            text = [part[n].question for n in kept]
            yield asked, case(model, [[one.image] for one in asked], text, [first[n] for n in kept])


def control_maps(one: Case, asked: Sequence[Asked], seed: int) -> dict[str, list[Tensor]]:
    """Over pixels: the object itself through the tower's grid of patches, nearness to the centre, and chance.

    Of image tokens, where patches have no grid. Merged tokens are coarser: they allow a little less.
    """
    made: dict[str, list[Tensor]] = {name: [] for name in CONTROLS}
    for number, item in enumerate(asked):
        layout = one.batch.layout.images[number]
        cells = layout.grid if layout.patches is None else layout.patches
        if cells is None:
            raise BadInputError(f"this model's patches have no grid: {one.batch.layout.why}")
        rows, cols = cells.shape[:2]
        box = frame(one.model, item.image, (rows, cols))
        generator = torch.Generator().manual_seed(seed + number)
        made["ideal"].append(coarsened(item.mask, (rows, cols), box))
        made["centre"].append(from_centre(item.image.size))
        made["random"].append(on_picture(torch.rand(rows, cols, generator=generator), box, item.image.size))
    return made


def drawn(maps: Maps, asked: Sequence[Asked]) -> list[Float[Tensor, "height width"]]:
    """Each sample's maps over its picture."""
    return [on_pixels(own, 0, item.image.size) for own, item in zip(maps, asked, strict=True)]


def judge(
    model: HookedMM,
    pairs: Sequence[ScenePair],
    methods: Sequence[str],
    *,
    size: int = 16,
    steps: int = 10,
    pictures: int = 6,
    seed: int = 0,
    only_right: bool = True,
) -> Found:
    """Every method's maps of what the model is asked, held against truth and answer.

    Args:
        model: The model.
        pairs: Whose first scenes are asked about.
        methods: Of `METHODS`.
        size: Samples at a time.
        steps: Of deletion and insertion; 0 leaves these out, which take most of the time.
        pictures: How many samples are kept to be drawn.
        seed: Of the random control.
        only_right: Leave out what the model answers wrongly.

    Raises:
        BadInputError: For an unknown method.
    """
    for name in methods:
        if name not in METHODS:
            raise unknown("attribution method", name, METHODS)
    found = Found()
    for asked, one in cases(model, pairs, size, found, only_right):
        maps = control_maps(one, asked, seed + len(found.values.get("ideal", {}).get("IoU", [])))
        for name in methods:
            if name in found.refused:
                continue
            try:
                maps[name] = drawn(attribution(name, one), asked)
            except BadInputError as error:
                found.refused[name] = str(error)
        for number, item in enumerate(asked):
            best = located(maps["ideal"][number], item.mask).auroc
            for name, own in maps.items():
                at = located(own[number], item.mask, item.others)
                areas = (float("nan"), float("nan"))
                if steps:
                    chance = scores(one, number, kind=None)
                    areas = deletion_and_insertion(chance, item.image, own[number], steps=steps)
                found.add(name, (at.auroc, at.auroc / best, at.among, at.iou, *areas))
            if len(found.shown) < pictures:
                found.shown.append((item, {name: own[number] for name, own in maps.items()}))
    return found


def scored(found: Found, draws: int, seed: int) -> list[Score]:
    """Means over samples with their intervals; of each measure the samples that have it."""
    made = []
    for method, measures in found.values.items():
        for name, values in measures.items():
            known = torch.tensor(values, dtype=torch.float64)
            known = known[~known.isnan()]
            if len(known):
                value, low, high = (float(end) for end in bootstrap(known, draws=draws, seed=seed))
                made.append(Score(f"{name}, {method}", "image", None, value, low, high, len(known), len(known)))
    return made


def table(result: Result, found: Found) -> list[list[str]]:
    """A row per method, best first."""
    by = {one.score: one for one in result.scores}
    names = sorted(found.values, key=lambda method: -by[f"pixel AUROC, {method}"].value)
    rows = [["", *MEASURES]]
    for method in names:
        cells = [by.get(f"{measure}, {method}") for measure in MEASURES]
        rows.append([method, *("" if one is None else f"{one.value:.3f}" for one in cells)])
    return rows


def entries(found: Found) -> list[Entry]:
    """The first samples, every method's map beside the others."""
    return [
        Entry(item.title, pictures=[(f"{name}: {told(own)}", blended(item.image, own)) for name, own in maps.items()])
        for item, maps in found.shown
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse faithfulness`."""
    parser = new_parser("faithfulness", __doc__)
    parser.add_argument("--model", type=ModelSource, required=True, help="the model to look into")
    parser.add_argument("--methods", type=list[str], default=list(METHODS), help="which are held against each other")
    parser.add_argument("--attribute", type=str, default="colour", help=f"what is asked: {', '.join(ATTRIBUTES)}")
    parser.add_argument("--split", type=str, default="test", help=f"of scenes: {', '.join(SPLITS)}")
    parser.add_argument("--size", type=int, default=100, help="questions")
    parser.add_argument("--only_right", type=bool, default=True, help="leave out what the model answers wrongly")
    parser.add_argument("--batch_size", type=int, default=16, help="questions at a time")
    parser.add_argument("--steps", type=int, default=10, help="of deletion and insertion; 0 leaves them out")
    parser.add_argument("--pictures", type=int, default=6, help="samples that are drawn")
    parser.add_argument("--device", type=str, default="cpu", help="where the model runs: cuda, cuda:1, ...")
    parser.add_argument("--name", type=str | None, help="what to call the model in tables and plots")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap, over samples")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is left to chance")
    made: Any = parsed(parser, argv)
    pairs = [scene_pair(made.split, index, made.attribute, made.seed) for index in range(made.size)]
    found = judge(
        loaded(made),
        pairs,
        made.methods,
        size=made.batch_size,
        steps=made.steps,
        pictures=made.pictures,
        seed=made.seed,
        only_right=made.only_right,
    )
    if not found.values:
        raise BadInputError(f"the model answers none of {made.size} questions rightly, so there is nothing to explain")
    settings = {name: made[name] for name in ("attribute", "split", "size", "only_right", "steps", "draws", "seed")}
    means = scored(found, made.draws, made.seed)
    result = Result("faithfulness", made.name or made.model.name, means, settings)
    if found.wrong:
        what = "left out" if made.only_right else "explained by what would be right"
        result.notes.append(f"{found.wrong} of {made.size} questions are answered wrongly and {what}")
    result.notes += [f"{name}: {why}" for name, why in found.refused.items()]
    rows = table(result, found)
    with open(made.output / "faithfulness.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    write_gallery(made.output / "gallery.html", "Faithfulness", entries(found), result.notes)
    result.write(made.output)
    print("\n".join([*text_columns(rows), *result.notes, f"written to {str(made.output)!r}"]))
