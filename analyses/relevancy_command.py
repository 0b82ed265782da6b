"""Relevancy of answers: what each token that the model says rests on, through all layers, down to the patches.

    hooked-mm analyse relevancy --model.id small:llava --data ScenesDataModule --data.task questions --data.size 40 \\
        --output runs/relevancy

Chefer's rules (`relevancy.py`, `tower_relevancy.py`): answers are generated, then one forward pass over prompt and
answer and one backward pass for a token of each answer give the share that every position has in a token, and, through
connector and tower, every patch. Writes how relevancy is shared between picture, question, template and what was said
before, and of the first samples `gallery.html` and `maps.safetensors` with `maps.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from analyses.frame import finish, new_parser, parsed
from analyses.lens_page import token_text
from analyses.model_samples import loaded, samples_of
from analyses.picture_maps import picture_maps
from analyses.relevancy import Relevancies, relevancies, shares
from analyses.targets import Targets, token_ids
from analyses.token_maps import Draw, Explained, add_tokens, walk, without_empty, write
from analyses.tower_relevancy import TowerRelevancies, end_to_end
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM

RULE = (
    "a map shows the relevancy of each patch (R, Chefer et al. 2021) to the logit of the token that was said: at the "
    "language model's image positions, and through connector and tower; each map in its own scale"
)
ROLES = ("question", "template", "answer")


def by_role(batch: Batch, found: Relevancies) -> dict[tuple[str, str], Tensor]:
    """(score, columns) -> (n,): the share of picture, question, template and answer so far.

    Where pictures are read by cross-attention, positions hold none of them. An encoder's positions hold no answer.
    """
    values = shares(found.positions.double())
    masks = {role: batch.mask("text", role) for role in ROLES}
    if found.keys is None:
        masks = {"image": batch.mask("image"), **masks}
    return {
        ("share of relevancy", name): (values * mask.cpu()[found.targets.sample]).sum(1) for name, mask in masks.items()
    }


class Explainer:
    """Relevancy of a batch's targets, with maps of the samples that are drawn."""

    def __init__(self, model: HookedMM, made: Any) -> None:
        self.model, self.made = model, made
        self.tower = made.tower is not False
        self.notes: list[str] = []
        self.text = token_text(None if model.processor is None else model.tokenizer)

    def relevant(self, batch: Batch, targets: Targets) -> tuple[Relevancies, TowerRelevancies | None]:
        """Through the tower where that is asked for or can be had."""
        options = {"kind": self.made.kind, "normalise": self.made.normalise}
        # A batch without pictures says nothing of the others.
        if self.tower and (batch.has_images or self.made.tower):
            try:
                found = end_to_end(self.model, batch, targets, **options)
                return found.text, found
            except BadInputError as error:
                if self.made.tower:
                    raise
                self.tower = False
                self.notes.append(f"relevancy ends at the language model's positions: {error}")
        return relevancies(self.model, batch, targets, **options), None

    def __call__(self, batch: Batch, targets: Targets, pictures: Draw) -> list[Explained]:
        """See `token_maps.Explain`."""
        found, tower = self.relevant(batch, targets)
        sums, explained = by_role(batch, found), []
        values = found.positions if found.keys is None else found.keys
        ids = token_ids(batch)
        for number, sample in enumerate(targets.sample.tolist()):
            one = Explained({key: value[number : number + 1] for key, value in sums.items()})
            one.arrays["positions"] = found.positions[number]
            if found.keys is not None:
                one.arrays["keys"] = found.keys[number]
            if found.decoder is not None:
                one.arrays["decoder"] = found.decoder[number]
            one.facts = [(f"{score}: {columns}", float(value[number])) for (score, columns), value in sums.items()]
            one.facts += [("most relevant words", self.words(batch, ids, sample, found.positions[number]))]
            images = pictures[sample]
            if images:
                drawn = {}
                try:
                    drawn["language-model"] = picture_maps(self.model, batch, sample, values[number], images)
                except BadInputError as error:
                    one.text = f"There is no map of the language model's positions: {error}"
                if tower is not None:
                    drawn["through-the-tower"] = tower.maps(self.model, batch, number, images)
                one.maps, empty = without_empty(drawn)
                if empty:
                    one.text = f"{one.text} Not drawn, as nothing of it reaches them: {', '.join(empty)}.".strip()
            explained.append(one)
        return explained

    def words(self, batch: Batch, ids: Tensor, sample: int, values: Tensor, count: int = 6) -> str:
        """The text tokens of largest relevancy, with their shares."""
        text = values * batch.mask("text", sample=sample)[sample].cpu()
        best = text.topk(min(count, len(text)))
        told = [(self.text(int(ids[sample, place])).strip(), float(v)) for v, place in zip(*best, strict=True) if v > 0]
        return ", ".join(f"{word} {value:.3f}" for word, value in told) or "none"


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse relevancy`."""
    parser = new_parser("relevancy", __doc__)
    add_tokens(parser)
    parser.add_argument(
        "--tower", type=bool | None, help="through connector and tower; where it can be had unless told"
    )
    parser.add_argument("--normalise", type=bool, default=True, help="rows of R - I divided by their sums")
    made = parsed(parser, argv)
    model = loaded(made)
    samples, explainer = samples_of(made, model), Explainer(model, made)
    found = walk(samples, made, explainer)
    notes = [*samples.notes(), *explainer.notes]
    finish(write("relevancy", "Relevancy", RULE, found, [None], made, notes, ("tower", "normalise")), made.output)
