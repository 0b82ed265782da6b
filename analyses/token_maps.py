"""What commands that explain tokens of answers share: options, the walk over samples, gallery, arrays and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float64
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor

from analyses.by_sample import mean_scores
from analyses.gallery import Entry, write_gallery
from analyses.lens_page import token_text
from analyses.map_overlay import SIDE, blended, is_empty, scale_of, told
from analyses.model_samples import Samples, add_model
from analyses.picture_maps import PictureMap
from analyses.result import Result, Score
from analyses.targets import Kind, NoTargetsError, Targets, answer_targets, special_ids
from hooked_mm.batch import Batch
from hooked_mm.data import Sample
from hooked_mm.drawing import enlarge
from hooked_mm.errors import BadInputError
from hooked_mm.prepare import load_images
from hooked_mm.tensor_folder import write_folder


@dataclass
class Explained:
    """What is found of one token.

    Attributes:
        sums: (score, of which columns) -> a number per layer, or one.
        maps: Name, as arrays are called, -> a map per grid of the sample's pictures; none that are empty.
        captions: Of maps whose name says too little.
        arrays: Name -> further arrays that are written.
        facts: For the gallery, (name, value).
        text: For the gallery.
    """

    sums: dict[tuple[str, str], Float64[Tensor, " layers"]]
    maps: dict[str, list[PictureMap]] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    facts: list[tuple[str, Any]] = field(default_factory=list)
    text: str = ""


Draw = Sequence[Sequence[Image.Image] | None]
"""Per sample of a batch its pictures, or None where no maps are wanted."""

Explain = Callable[[Batch, Targets, Draw], list[Explained]]
"""Batch, targets, pictures -> what is found of each target, in their order."""


@dataclass
class Found:
    """What is kept of all samples.

    Attributes:
        sums: (score, columns) -> per sample, the sum over its tokens.
        tokens: How many each sample has.
        unanswered: Samples without a token to explain.
        entries: Of the gallery.
        tensors: Arrays of the samples in the gallery.
        about: What the arrays are of.
    """

    sums: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    unanswered: int = 0
    entries: list[Entry] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    about: list[dict[str, Any]] = field(default_factory=list)


def add_tokens(parser: ArgumentParser) -> None:
    """Options for the model, its samples, and which tokens of their answers are explained."""
    add_model(parser, "generated")
    parser.add_argument(
        "--tokens", type=Literal["all", "first"] | list[int], default="all", help="of the answer: all, first, numbers"
    )
    parser.add_argument("--kind", type=Kind, default="logit", help="what of the chosen token is differentiated")
    parser.add_argument("--samples", type=int, default=12, help="so many in the gallery and among the arrays")


def walk(samples: Samples, made: Any, explain: Explain) -> Found:
    """All samples, batch by batch.

    Raises:
        BadInputError: If no sample has a token to explain.
    """
    if made.answer == "none":
        raise BadInputError("answer=none: there are no answer tokens to explain; take generated or given")
    found = Found()
    for own, batch in samples:
        try:
            targets = answer_targets(batch, made.tokens, special_ids(samples.model))
        except NoTargetsError:
            found.unanswered += len(own)
            continue
        there = sorted(set(targets.sample.tolist()))
        found.unanswered += len(own) - len(there)
        drawn = there[: max(0, made.samples - len(found.about))]
        pictures = [load_images(one.images) if place in drawn else None for place, one in enumerate(own)]
        explained = explain(batch, targets, pictures)
        for place in there:
            mine = (targets.sample == place).nonzero()[:, 0].tolist()
            parts = [explained[number] for number in mine]
            found.tokens.append(len(mine))
            for key in parts[0].sums:
                found.sums.setdefault(key, []).append(torch.stack([part.sums[key].double() for part in parts]).sum(0))
            shown = pictures[place]
            if shown is not None:
                show(samples, found, own[place], shown, targets.take(mine), parts)
    if not found.tokens:
        why = "; ".join(samples.notes() or ["all answers are empty, or shorter"])
        raise BadInputError(f"no sample has an answer token to explain: {why}")
    return found


def show(
    samples: Samples,
    found: Found,
    sample: Sample,
    images: Sequence[Image.Image],
    targets: Targets,
    parts: Sequence[Explained],
) -> None:
    """A sample's tokens in the gallery, and its arrays."""
    name, boxes = f"sample-{len(found.about)}", {}
    text = token_text(None if samples.model.processor is None else samples.model.tokenizer)
    said = [text(token) for token in targets.token.tolist()]
    for number, part in enumerate(parts):
        for key, value in part.arrays.items():
            found.tensors[f"{name}/answer-{number}/{key}"] = value.float()
        names = ["picture"] if len(images) == 1 else [f"picture {n + 1}" for n in range(len(images))]
        pictures = [(shown, enlarge(image, SIDE)) for shown, image in zip(names, images, strict=True)]
        for key, maps in part.maps.items():
            for one in maps:
                which = f"picture-{one.picture}{'-overview' if one.overview else ''}"
                path = f"{name}/answer-{number}/{key}/{which}"
                found.tensors[path], boxes[path] = one.values.float(), [round(float(side), 4) for side in one.box]
                where = f", {which.replace('-', ' ')}" if len(images) > 1 or len(maps) > 1 else ""
                caption = f"{part.captions.get(key, key.replace('-', ' '))}{where}: {told(one.values)}"
                pictures.append((caption, blended(images[one.picture], one.values, one.box)))
        facts = [
            ("token", f"{said[number].strip() or said[number]!r}, number {number + 1} of {len(parts)}"),
            ("its row", f"position {int(targets.row[number])}, which predicts it"),
            *part.facts,
        ]
        title = f"{sample.id}: {said[number].strip()}"
        found.entries.append(Entry(title, facts, pictures, f"{sample.text}\n{part.text}".strip()))
    found.about.append({"name": name, "id": sample.id, "prompt": sample.text, "answer": said, "boxes": boxes})


def without_empty(maps: Mapping[str, list[PictureMap]]) -> tuple[dict[str, list[PictureMap]], list[str]]:
    """Maps that have something to show, and the names of those that do not."""
    empty = [name for name, drawn in maps.items() if all(is_empty(scale_of(one.values)) for one in drawn)]
    return {name: drawn for name, drawn in maps.items() if name not in empty}, empty


def scores(found: Found, layers: Sequence[int | None], draws: int, seed: int) -> list[Score]:
    """Means over each sample's tokens, then over samples, with intervals over samples."""
    made, rows = [], torch.tensor(found.tokens)
    for (name, columns), sums in found.sums.items():
        made += mean_scores({name: torch.stack(sums)}, rows, columns, layers, draws, seed)
    return made


def write(
    analysis: str,
    title: str,
    rule: str,
    found: Found,
    layers: Sequence[int | None],
    made: Any,
    notes: Sequence[str],
    settings: Sequence[str],
) -> Result:
    """Gallery and arrays of a command; the result, which is still to be written.

    Args:
        analysis: The command's name.
        title: Of the gallery.
        rule: What its maps show.
        found: Of all samples.
        layers: Of the scores; [None] where they are of none.
        made: The command's options.
        notes: What a reader must know.
        settings: Names of the options that the result shall tell.
    """
    name = made.name or made.model.name
    if found.unanswered:
        notes = [*notes, f"{found.unanswered} samples have no such answer token"]
    told_options = {
        key: made[key] for key in ("answer", "max_new_tokens", "tokens", "kind", *settings, "draws", "seed")
    }
    content = {"data": made.data.describe(), **told_options}
    write_folder(made.output, "maps", found.tensors, {"layers": list(layers), "samples": found.about, **told_options})
    write_gallery(made.output / "gallery.html", f"{title} of {name}", found.entries, [rule, *notes])
    return Result(analysis, name, scores(found, layers, made.draws, made.seed), content, list(notes))
