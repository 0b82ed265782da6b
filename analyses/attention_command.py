"""What the model attends to when it says each token of its answer: heads x layers, and maps over the pictures.

    hooked-mm analyse attention --model.id small:llava --data ScenesDataModule --data.task questions --data.size 40 \\
        --output runs/attention

Answers are generated first, without any attention being held; one pass over prompt and answer then takes the rows that
predict the answer's tokens, in the layers and heads asked for. Writes scores over layers (the share of attention that
goes to the picture and to the question, and the mean per column), `heads.png` (heads x layers, means over the data
set), and of the first samples `gallery.html` and `maps.safetensors` with `maps.json`: heads x layers of every token,
and the maps of the heads that look at the picture most, or of `--pairs`; with `--points` also how much each token looks
at the patches there: `--points '[[0, .25, .5]]'` is the first picture's, a quarter from the left and in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from analyses.attention_views import AnswerAttention, answer_attention, clicked_columns, head_maps, strongest
from analyses.by_sample import mean_scores
from analyses.frame import finish, new_parser, parsed
from analyses.gallery import Entry, write_gallery
from analyses.head_figure import as_picture, head_figure
from analyses.lens_page import token_text
from analyses.map_overlay import Scale, blended, scale_of, told
from analyses.model_samples import Samples, add_model, loaded, samples_of
from analyses.picture_maps import PictureMap
from analyses.result import Result, Score
from analyses.targets import NoTargetsError
from hooked_mm.batch import Batch
from hooked_mm.connector import Connector, connector_map, connector_patterns
from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import load_images
from hooked_mm.tensor_folder import write_folder

COLUMNS = ("image", "question")
MEASURES = {"share of attention": True, "mean attention per column": False}
CLICKED = "clicked patches, mean per column"
SCALES = {"own": "each map in its own scale", "common": "all maps of a token in one scale"}


@dataclass
class Seen:
    """What is kept of the samples.

    Attributes:
        heads: (measure, column) -> per sample (layers, heads), means over its answer's tokens.
        tokens: Of each sample's answer.
        unanswered: Samples without an answer's token.
        entries: Of the gallery.
        tensors: Maps, and heads x layers of every token, of the samples in the gallery.
        about: What the tensors are of.
        layers, head_numbers: What was looked at.
    """

    heads: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    unanswered: int = 0
    entries: list[Entry] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    about: list[dict[str, Any]] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    head_numbers: list[int] = field(default_factory=list)


def look(samples: Samples, made: Any) -> Seen:
    """All samples, batch by batch."""
    seen = Seen()
    for own, batch in samples:
        try:
            attention = answer_attention(samples.model, batch, made.tokens, made.layers, made.heads)
        except NoTargetsError:
            seen.unanswered += len(own)
            continue
        seen.layers, seen.head_numbers = list(attention.patterns), list(attention.heads)
        values = {(name, column): _values(attention, column, name) for name in MEASURES for column in COLUMNS}
        connector = None
        if len(seen.about) < made.samples and connector_patterns(samples.model):
            connector = connector_map(samples.model, batch)
        for place, sample in enumerate(own):
            mine = (attention.targets.sample == place).nonzero()[:, 0].tolist()
            if not mine:
                seen.unanswered += 1
                continue
            if len(seen.about) < made.samples:
                show(samples.model, batch, place, sample, attention, mine, values, made, seen, connector)
            seen.tokens.append(len(mine))
            for key, found in values.items():
                seen.heads.setdefault(key, []).append(found[mine].mean(0))
    return seen


def _values(attention: AnswerAttention, column: str, measure: str) -> Tensor:
    """Heads x layers of every token; NaN where a sample has no such columns."""
    found = attention.by_head(column, share=MEASURES[measure])
    return found.masked_fill(~attention.groups[column].any(1).cpu()[:, None, None], torch.nan)


def show(
    model: HookedMM,
    batch: Batch,
    place: int,
    sample: Sample,
    attention: AnswerAttention,
    tokens: Sequence[int],
    values: dict[tuple[str, str], Tensor],
    made: Any,
    seen: Seen,
    connector: Connector | None = None,
) -> None:
    """A sample's tokens in the gallery, and its arrays."""
    name = f"sample-{len(seen.about)}"
    images = load_images(sample.images)
    clicked = _clicked(model, batch, attention, place, made.points, images)
    text = token_text(None if model.processor is None else model.tokenizer)
    said = [text(int(attention.targets.token[token])) for token in tokens]
    for (measure, column), found in values.items():
        seen.tensors[f"{name}/{column} {measure}"] = found[list(tokens)].float()
    if clicked is not None:
        seen.tensors[f"{name}/{CLICKED}"] = clicked[list(tokens)].float()
    boxes: dict[str, list[float]] = {}
    for number, token in enumerate(tokens):
        share = values["share of attention", "image"][token]
        pairs = made.pairs or strongest(share, seen.layers, seen.head_numbers, made.show)
        why, maps = "", {}
        try:
            maps = head_maps(model, batch, attention, token, pairs, images, connector)
        except BadInputError as error:
            why = f"There is no map over the picture: {error}"
        for (layer, head), drawn in maps.items():
            for one in drawn:
                key = f"{name}/answer-{number}/layer-{layer}/head-{head}/{_picture(one)}"
                seen.tensors[key] = one.values.float()
                boxes[key] = [round(float(side), 4) for side in one.box]
        shares = [(f"share of attention: {c}", float(values["share of attention", c][token].mean())) for c in COLUMNS]
        facts = [
            ("token", f"{said[number].strip() or said[number]!r}, number {number + 1} of {len(tokens)}"),
            ("its row", f"position {int(attention.targets.row[token])}, which predicts it"),
            *shares,
        ]
        panels = [(_panel(*key), found[token]) for key, found in values.items()]
        panels += [] if clicked is None else [(CLICKED, clicked[token])]
        figure = as_picture(head_figure(panels, seen.layers, seen.head_numbers))
        pictures = [("heads x layers", figure), *((_caption(n, images), image) for n, image in enumerate(images))]
        pictures += drawn_maps(maps, images, made.scale)
        seen.entries.append(
            Entry(f"{sample.id}: {said[number].strip()}", facts, pictures, f"{sample.text}\n{why}".strip())
        )
    seen.about.append({"name": name, "id": sample.id, "prompt": sample.text, "answer": said, "boxes": boxes})


def _clicked(
    model: HookedMM,
    batch: Batch,
    attention: AnswerAttention,
    place: int,
    points: Sequence[tuple[int, float, float]],
    images: Sequence[Image.Image],
) -> Tensor | None:
    """What every token's row gives to the patches at some places, mean per patch; None if none are asked for.

    Raises:
        BadInputError: If a point lies outside a picture, or the sample has no such picture or patch.
    """
    if not points or not images:
        return None
    places = []
    for picture, x, y in points:
        if not (0 <= picture < len(images) and 0 <= x < 1 and 0 <= y < 1):
            raise BadInputError(
                f"point [{picture}, {x}, {y}] of {len(images)} pictures; give a picture's number from 0 on, and shares "
                "of its width and height from 0 up to 1"
            )
        places.append((picture, x * images[picture].width, y * images[picture].height))
    return attention.by_head(clicked_columns(model, batch, attention, place, places, images))


def _caption(number: int, images: Sequence[Image.Image]) -> str:
    return f"picture {number + 1}" if len(images) > 1 else "picture"


def _panel(measure: str, column: str) -> str:
    return f"{column}, {'share' if MEASURES[measure] else 'mean per column'}"


def _picture(one: PictureMap) -> str:
    return f"picture-{one.picture}{'-overview' if one.overview else ''}"


def drawn_maps(
    maps: dict[tuple[int, int], list[PictureMap]], images: Sequence[Image.Image], scale: str = "both"
) -> list[tuple[str, Image.Image]]:
    """Maps over their pictures with captions, each in its own scale, in that of all, or both.

    Args:
        maps: (layer, head) -> a map per grid.
        images: The sample's pictures.
        scale: `own`, `common` or `both`.
    """
    every = [one.values for drawn in maps.values() for one in drawn]
    found = []
    for kind in SCALES if scale == "both" else [scale]:
        ends: Scale | None = scale_of(*every) if kind == "common" and every else None
        for (layer, head), drawn in maps.items():
            for one in drawn:
                which = f", {_caption(one.picture, images)}" if len(images) > 1 else ""
                which += ", overview" if one.overview else ""
                caption = f"layer {layer}, head {head}{which}: {told(one.values)}, {kind} scale"
                found.append((caption, blended(images[one.picture], one.values, one.box, scale=ends)))
    return found


def scores(seen: Seen, draws: int, seed: int) -> list[Score]:
    """Means over heads, then over the tokens of an answer, then over samples, per layer."""
    rows = torch.tensor(seen.tokens)
    found = []
    for column in COLUMNS:
        sums = {name: torch.stack(seen.heads[name, column]).mean(-1) * rows[:, None] for name in MEASURES}
        found += mean_scores(sums, rows, column, seen.layers, draws, seed)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse attention`."""
    parser = new_parser("attention", __doc__)
    add_model(parser, "generated")
    views = parser.add_argument_group("views")
    views.add_argument("--layers", type=list[int] | None, help="only these; all unless given")
    views.add_argument("--heads", type=list[int] | None, help="only these; all unless given")
    views.add_argument(
        "--tokens", type=Literal["all", "first"] | list[int], default="all", help="of the answer: all, first, numbers"
    )
    views.add_argument("--samples", type=int, default=12, help="so many in the gallery and among the maps")
    views.add_argument("--show", type=int, default=4, help="heads with a map per token: those most on the picture")
    views.add_argument("--pairs", type=list[tuple[int, int]], default=[], help="[layer, head] to map instead")
    views.add_argument(
        "--points",
        type=list[tuple[int, float, float]],
        default=[],
        help="[picture, x, y], patches to look at, in shares",
    )
    views.add_argument("--scale", type=Literal["own", "common", "both"], default="both", help="of the maps' colours")
    made = parsed(parser, argv)
    if made.answer == "none":
        raise BadInputError("answer=none: there are no answer tokens to look from; take generated or given")
    model = loaded(made)
    samples = samples_of(made, model)
    seen = look(samples, made)
    if not seen.tokens:
        raise BadInputError("no sample has an answer token; " + "; ".join(samples.notes() or ["all answers are empty"]))
    name = made.name or made.model.name
    notes = samples.notes() + ([f"{seen.unanswered} samples have no such answer token"] if seen.unanswered else [])
    options = ("answer", "max_new_tokens", "layers", "heads", "tokens", "draws", "seed")
    settings = {**{key: made[key] for key in options}, "data": made.data.describe()}
    result = Result("attention", name, scores(seen, made.draws, made.seed), settings, notes)
    means = [(_panel(*key), torch.stack(found).nanmean(0)) for key, found in seen.heads.items()]
    head_figure(means, seen.layers, seen.head_numbers).savefig(made.output / "heads.png", dpi=120)
    about = {"layers": seen.layers, "heads": seen.head_numbers, "samples": seen.about}
    write_folder(made.output, "maps", seen.tensors, about)
    shown = [SCALES[kind] for kind in SCALES if made.scale in (kind, "both")]
    rule = "a map shows what the row that predicts the token gives to each patch; colours: " + ", then ".join(shown)
    write_gallery(made.output / "gallery.html", f"Attention of {name}", seen.entries, [rule, *notes])
    finish(result, made.output)
