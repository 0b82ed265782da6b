"""Grad-CAM of answers: where the attention looks that speaks for each token the model says.

    hooked-mm analyse gradcam --model.id small:llava --data ScenesDataModule --data.task questions --data.size 40 \\
        --output runs/gradcam

Answers are generated; one forward pass over prompt and answer, and one backward pass for a token of each answer, give
the maps of the row that predicts the token, layer by layer, or with `--rows question` those of the question's tokens.
Writes scores over layers (the share of a map that lies on the picture, and the share of rows that have a gradient at
all), and of the first samples `gallery.html` and `maps.safetensors` with `maps.json`. Maps without a gradient are not
drawn, and named: at the last layer only the row that predicts the token has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from analyses.frame import finish, new_parser, parsed
from analyses.grad_cam import GradCams, default_point, grad_cam, pattern_layers
from analyses.lens_page import token_text
from analyses.model_samples import loaded, samples_of
from analyses.picture_maps import PictureMap, picture_maps
from analyses.targets import Targets, token_ids
from analyses.token_maps import Draw, Explained, add_tokens, walk, without_empty, write
from hooked_mm.batch import Batch
from hooked_mm.connector import Connector, connector_map, connector_patterns
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM

RULE = (
    "a map shows the mean over heads of relu(gradient * attention) from one row of attention to each patch, for the "
    "token that was said; each map in its own scale"
)


def on_picture(model: HookedMM, batch: Batch, found: GradCams) -> list[Tensor]:
    """Per target (layers, rows): the share of each map on image positions, 0 of an empty one."""
    made = []
    image = batch.mask("image").cpu()
    for maps, sample in zip(found.maps, found.targets.sample.tolist(), strict=True):
        total = maps.double().sum(-1)
        # What cross-attention to a tower reads is the picture alone.
        own = total if maps.shape[-1] != image.shape[1] else maps.double()[..., image[sample]].sum(-1)
        made.append(own / total.where(total > 0, 1))
    return made


class Explainer:
    """Grad-CAM of a batch's targets, with maps of the samples that are drawn."""

    def __init__(self, model: HookedMM, made: Any) -> None:
        self.model, self.made = model, made
        self.point = made.point or default_point(model)
        self.layers = pattern_layers(model, self.point, made.layers)
        self.text = token_text(None if model.processor is None else model.tokenizer)

    def __call__(self, batch: Batch, targets: Targets, pictures: Draw) -> list[Explained]:
        """See `token_maps.Explain`."""
        made = self.made
        found = grad_cam(
            self.model, batch, targets, rows=made.rows, layers=self.layers, kind=made.kind, point=self.point
        )
        shares, explained = on_picture(self.model, batch, found), []
        connector = None
        if connector_patterns(self.model) and any(own is not None for own in pictures):
            connector = connector_map(self.model, batch)
        for number, sample in enumerate(targets.sample.tolist()):
            reached = found.reached[number]
            share = (shares[number] * reached).sum(1) / reached.sum(1).clamp_min(1)
            sums = {
                ("share of Grad-CAM", "image"): share,
                ("rows with a gradient", "all"): reached.double().mean(1),
            }
            one = Explained(sums, arrays={"cam": found.maps[number]}, facts=[("score", float(found.scores[number]))])
            images = pictures[sample]
            if images is not None:
                self.draw(one, batch, found, number, images, connector)
            explained.append(one)
        return explained

    def draw(
        self,
        one: Explained,
        batch: Batch,
        found: GradCams,
        number: int,
        images: Sequence[Image.Image],
        connector: Connector | None,
    ) -> None:
        """A target's maps over its sample's pictures."""
        sample = int(found.targets.sample[number])

        def over(values: Tensor) -> list[PictureMap]:
            return picture_maps(self.model, batch, sample, values, images, connector)

        maps, reached = found.maps[number], found.reached[number]
        if not images:
            return
        try:
            drawn = {"mean": over(found.mean(number))}
            if maps.shape[1] == 1:
                drawn |= {f"layer-{layer}": over(maps[place, 0]) for place, layer in enumerate(found.layers)}
            else:
                names = self.words(batch, sample, found.queries[number])
                for row, name in enumerate(names):
                    kept = maps[reached[:, row], row]
                    drawn[f"row-{row}"] = over(kept.mean(0) if len(kept) else maps[0, row])
                    one.captions[f"row-{row}"] = f"row of {name!r}"
        except BadInputError as error:
            one.text = f"There is no map over the picture: {error}"
            return
        one.maps, empty = without_empty(drawn)
        lost = [f"layer {layer}" for place, layer in enumerate(found.layers) if not bool(reached[place].all())]
        if lost:
            one.text = f"Rows without a gradient at {', '.join(lost)}: their maps are empty and not part of any mean."
        if empty:
            told = ", ".join(one.captions.get(name, name) for name in empty)
            one.text = f"{one.text} Not drawn, as they are zero everywhere: {told}.".strip()

    def words(self, batch: Batch, sample: int, rows: Tensor) -> list[str]:
        """The tokens at rows of the stack that the attention lies in."""
        text = batch if self.point.startswith("encoder.") or batch.decoder is None else batch.decoder
        return [self.text(token).strip() for token in token_ids(text)[sample, rows.to(text.modality.device)].tolist()]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse gradcam`."""
    parser = new_parser("gradcam", __doc__)
    add_tokens(parser)
    parser.add_argument(
        "--rows", type=str, default="target", help="whose attention: target, question, or other positions"
    )
    parser.add_argument("--layers", type=list[int] | None, help="only these; all unless given")
    parser.add_argument("--point", type=str | None, help="another attention: encoder.blocks.{}.attn.hook_pattern")
    made = parsed(parser, argv)
    model = loaded(made)
    samples, explainer = samples_of(made, model), Explainer(model, made)
    found = walk(samples, made, explainer)
    reached = torch.stack(found.sums["rows with a gradient", "all"]).sum(0) / sum(found.tokens)
    part = dict(zip(explainer.layers, reached.tolist(), strict=True))
    empty = [
        f"layer {layer}: {1 - share:.0%} of the rows asked for have no gradient, so that their maps are empty"
        for layer, share in part.items()
        if share < 1
    ]
    settings = ("rows", "layers", "point")
    result = write("gradcam", "Grad-CAM", RULE, found, explainer.layers, made, [*samples.notes(), *empty], settings)
    # Where no row has a gradient there is no map to have a share on the picture.
    result.scores = [one for one in result.scores if one.modality == "all" or part[one.layer or 0] > 0]
    finish(result, made.output)
