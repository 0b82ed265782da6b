"""Attribution methods by name: where in its pictures a model's answer comes from, told by each as maps over pictures.

To add a method, add a function that takes a `Case` and a row of `METHODS`; commands, tables and studies offer it then.
All explain the same score of the same target, so that their maps can be held against each other (`faithfulness`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from analyses.attention_views import rows_by_sample, sees_by
from analyses.grad_cam import grad_cam
from analyses.integrated_gradients import integrated_gradients
from analyses.logit_attribution import logit_attribution
from analyses.occlusion import Scores, occlusion
from analyses.picture_maps import PictureMap, picture_maps, tower_maps
from analyses.relevancy import relevancies
from analyses.saliency import Measure, saliency
from analyses.targets import Kind, Targets, answer_targets, prompt_targets, token_ids
from analyses.tower_relevancy import end_to_end
from hooked_mm.attention_rows import attention_rows, pattern_layers
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.hooked import HookedMM
from hooked_mm.prompts import Turn

Maps = list[list[PictureMap]]
"""Per sample its maps."""


@dataclass(frozen=True)
class Case:
    """Samples whose answer's first token is explained.

    Attributes:
        model: The model.
        batch: The prompts.
        targets: One per sample.
        images: The pictures of each sample.
        text: What each was asked, for methods that show the model other pictures.
        kind: Whether a logit or a log-probability is explained.
        history: The turns before, of each sample; none unless given.
        said: Ids of the answer in front of the token that is explained, of each sample; none unless given. They stand
            in the batch, too.
    """

    model: HookedMM
    batch: Batch
    targets: Targets
    images: Sequence[Sequence[Image.Image]]
    text: Sequence[str]
    kind: Kind = "logit"
    history: Sequence[Sequence[Turn]] | None = None
    said: Sequence[Sequence[int]] | None = None

    def about(self, sample: int, shown: Sequence[Sequence[Image.Image]]) -> tuple[Batch, Int[Tensor, " n"]]:
        """What a sample was asked, about other pictures: the batch, and the row in each that predicts the target."""
        history = None if self.history is None else [self.history[sample]] * len(shown)
        batch = self.model.prepare([list(own) for own in shown], self.text[sample], history=history)
        said = [] if self.said is None else list(self.said[sample])
        if said:
            tokens = torch.tensor([said] * len(shown), device=self.model.device)
            names = [self.model.tokenizer.convert_ids_to_tokens(said) for _ in shown]
            batch = batch.extend(tokens, torch.ones_like(tokens, dtype=torch.bool), names)
        return batch, (batch.decoder or batch).last_prompt().cpu() + len(said)

    def on_positions(self, values: Float[Tensor, "n p"]) -> Maps:
        """Maps of values at positions of the sequence (or of keys)."""
        return [
            picture_maps(self.model, self.batch, sample, values[number], self.images[sample])
            for number, sample in enumerate(self.targets.sample.tolist())
        ]

    def on_patches(self, values: Float[Tensor, "rows places"]) -> Maps:
        """Maps of values at the tower's patches."""
        return [
            tower_maps(self.model, self.batch, sample, values, self.images[sample])
            for sample in self.targets.sample.tolist()
        ]


Method = Callable[[Case], Maps]


def case(
    model: HookedMM,
    images: Sequence[Sequence[Image.Image]],
    text: Sequence[str],
    tokens: Sequence[int],
    foil: Sequence[int] | None = None,
    kind: Kind = "logit",
) -> Case:
    """Samples from pictures, questions and the tokens to explain.

    Raises:
        BadInputError: If there are not as many of each, or a sample has no picture.
    """
    if not len(images) == len(text) == len(tokens) or not all(images):
        raise BadInputError(
            f"{len(images)} pictures, {len(text)} texts, {len(tokens)} tokens; give one each per sample"
        )
    batch = model.prepare([list(own) for own in images], list(text))
    return Case(model, batch, prompt_targets(batch, tokens, foil), images, text, kind)


def answer_case(
    model: HookedMM,
    batch: Batch,
    token: int,
    images: Sequence[Image.Image],
    text: str,
    kind: Kind = "logit",
    history: Sequence[Turn] = (),
) -> Case:
    """One token of an answer that was given.

    Args:
        model: The model.
        batch: One sample with its answer, as `generate(...).batch` has it.
        token: Its number in the answer, from 0.
        images: All pictures, those of earlier turns first.
        text: What was asked.
        kind: Whether a logit or a log-probability is explained.
        history: The turns before.

    Raises:
        BadInputError: If the answer has no such token, or the sample no picture.
    """
    if not images or len(batch) != 1:
        raise BadInputError(f"{len(batch)} samples with {len(images)} pictures; give one sample that was shown some")
    text_batch = batch.decoder or batch
    said = token_ids(text_batch)[text_batch.mask(role="answer")].tolist()[:token]
    targets = answer_targets(batch, [token])
    return Case(model, batch, targets, [images], [text], kind, [history] if history else None, [said])


def _attention(one: Case, last: bool = False) -> Maps:
    """The row that predicts the target, mean over heads and layers, or of the last layer alone."""
    part = sees_by(one.model, one.batch)
    layers = pattern_layers(one.model, "", part)
    rows, places = rows_by_sample(one.targets, len(one.batch))
    found = attention_rows(one.model, one.batch, rows, layers[-1:] if last else layers, part=part)
    mean = torch.stack([pattern.double().mean(1).cpu() for pattern in found.values()]).mean(0)
    return one.on_positions(mean[one.targets.sample, places])


def _relevancy(one: Case) -> Maps:
    found = relevancies(one.model, one.batch, one.targets, kind=one.kind)
    return one.on_positions(found.positions if found.keys is None else found.keys)


def _patch_relevancy(one: Case) -> Maps:
    found = end_to_end(one.model, one.batch, one.targets, kind=one.kind)
    places = enumerate(one.targets.sample.tolist())
    return [found.maps(one.model, one.batch, number, one.images[sample]) for number, sample in places]


def _grad_cam(one: Case) -> Maps:
    """Of the row that predicts the target, mean over layers."""
    found = grad_cam(one.model, one.batch, one.targets, kind=one.kind)
    return one.on_positions(torch.stack([found.mean(number) for number in range(len(one.targets))]))


def _logit_attribution(one: Case) -> Maps:
    """What all heads of all layers write into the logit from each position."""
    found = logit_attribution(one.model, one.batch, one.targets)
    return one.on_positions(found.by_position())


def _saliency(one: Case, measure: Measure, inside: bool = False) -> Maps:
    point = "vision.hook_embed" if inside else "hook_embed" if one.batch.decoder is None else "encoder.hook_embed"
    found = saliency(one.model, one.batch, one.targets, point, measure=measure, kind=one.kind)
    return one.on_patches(found) if inside else one.on_positions(found[one.targets.sample.to(found.device)])


def _integrated(one: Case) -> Maps:
    """From the mean of the picture's own tokens."""
    found = integrated_gradients(one.model, one.batch, one.targets, kind=one.kind)
    return one.on_positions(torch.stack(found.values))


def scores(one: Case, number: int, picture: int = 0, kind: Kind | None = "logit") -> Scores:
    """The score of one target for other pictures in the place of its own.

    Args:
        one: The case.
        number: Which of its targets.
        picture: Which of the sample's pictures is replaced.
        kind: What is scored; None for the token's probability.
    """
    sample = int(one.targets.sample[number])
    target = one.targets.take([number])

    def of(images: Sequence[Image.Image]) -> Float[Tensor, " n"]:
        shown = [list(one.images[sample]) for _ in images]
        for own, image in zip(shown, images, strict=True):
            own[picture] = image
        batch, rows = one.about(sample, shown)
        foil = None if target.foil is None or kind is None else target.foil.expand(len(shown))
        asked = Targets(torch.arange(len(shown)), rows, target.token.expand(len(shown)), foil)
        with torch.no_grad():
            logits = one.model.run_with_hooks(batch)
        assert logits is not None
        return asked.scores(logits, kind) if kind is not None else asked.scores(logits, "log_prob").exp()

    return of


def _occlusion(one: Case, share: int = 5) -> Maps:
    """Windows whose side is a fifth of the picture's shorter side."""
    made: Maps = []
    for number, sample in enumerate(one.targets.sample.tolist()):
        maps = []
        for picture, image in enumerate(one.images[sample]):
            drops = occlusion(scores(one, number, picture, one.kind), image, max(2, min(image.size) // share))
            maps.append(PictureMap(picture, False, drops, (0.0, 0.0, float(image.width), float(image.height))))
        made.append(maps)
    return made


METHODS: dict[str, tuple[Method, str]] = {
    "attention": (_attention, "attention of the row that predicts the token, mean over layers and heads"),
    "attention, last layer": (partial(_attention, last=True), "of the last layer alone"),
    "relevancy": (_relevancy, "attention and its gradients through all layers of the language model"),
    "relevancy, patches": (_patch_relevancy, "the same through connector and tower"),
    "Grad-CAM": (_grad_cam, "gradient times attention of the row that predicts the token, mean over layers"),
    "logit attribution": (_logit_attribution, "what heads write into the logit directly from each image token"),
    "gradient": (partial(_saliency, measure="norm"), "the norm of the gradient at image tokens"),
    "gradient x input": (partial(_saliency, measure="input"), "the size of gradient times image token"),
    "gradient x input, signed": (partial(_saliency, measure="signed input"), "the same with its sign"),
    "integrated gradients": (_integrated, "what image tokens add to the score, against their mean; sums to it"),
    "gradient, patches": (partial(_saliency, measure="norm", inside=True), "the norm of the gradient at patches"),
    "gradient x input, patches": (partial(_saliency, measure="input", inside=True), "gradient times patch"),
    "occlusion": (_occlusion, "what the score loses when a window of the picture is covered"),
}
"""Name -> function and what it tells."""


def attribution(name: str, one: Case) -> Maps:
    """The maps of a method, per target.

    Raises:
        BadInputError: For an unknown name, or a model whose structure the method can't go by.
    """
    if name not in METHODS:
        raise unknown("attribution method", name, METHODS)
    return METHODS[name][0](one)
