"""Visual-token ablation: what a prediction loses without some of an image's tokens.

The tokens of a picture are what the language model is given of it: image positions of `hook_embed` (of an encoder's, if
pictures enter there; latents, if a resampler made them), without separators, which hold no patch. Where features also
enter between layers, they are replaced there, too; where text attends to the picture by cross-attention, the tokens are
those that leave the projector, or the tower. With x_j (d,) token j of an image of n tokens, a replaced token becomes

    mean     the mean over the image's own n tokens
    zero     0
    noise    m + s * e, with m and s (d,) mean and standard deviation over the image's own tokens, e ~ N(0, 1)
    data     a vector that is given, such as the mean over a data set

    effect of a set of tokens = score of the target with all tokens - score with those of the set replaced

Which tokens: see `token_sets`. Curves over growing sets: see `deletion_curves`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from analyses.tail_logits import tail_logits
from analyses.targets import Targets
from hooked_mm.batch import Batch, Modality
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import Hook, HookSpec
from hooked_mm.value_layout import layout, stream_of

FillKind = Literal["mean", "zero", "noise", "data"]
ScoreKind = Literal["logit", "log_prob", "probability"]
INSERTED = "hook_insert_out"
BEHIND_TOWER = ("projector.hook_out", "vision.ln_final.hook_out")
"""Where a picture that is not in the sequence can be replaced, first come first served."""


@dataclass(frozen=True)
class ImageTokens:
    """Where a batch's image tokens stand in the values of a point; per sample in their order, filled up with -1.

    Attributes:
        point: The hook point.
        row, place: (b, n), as the point's values are laid out in (rows, places).
        image: (b, n), the how-manieth image of its sample each belongs to.
        shape: (rows, places) of the values.
    """

    point: str
    row: Int[Tensor, "b n"]
    place: Int[Tensor, "b n"]
    image: Int[Tensor, "b n"]
    shape: tuple[int, int]

    @property
    def real(self) -> Bool[Tensor, "b n"]:
        """Which of the n are tokens of the sample."""
        return self.row >= 0

    @property
    def counts(self) -> Int[Tensor, " b"]:
        """How many each sample has."""
        return self.real.sum(1)

    def gather(self, values: Float[Tensor, "rows places ..."]) -> Float[Tensor, "b n ..."]:
        """What stands at the tokens in values that are laid out like the point's; 0 beyond."""
        if tuple(values.shape[:2]) != self.shape:
            raise BadInputError(
                f"values of shape {tuple(values.shape)} are not laid out as {self.shape} of {self.point!r}"
            )
        found = values[self.row.clamp_min(0).to(values.device), self.place.clamp_min(0).to(values.device)]
        real = self.real.to(values.device)
        return torch.where(real.reshape(*real.shape, *[1] * (found.ndim - 2)), found, torch.zeros_like(found))

    def held(self, value: Tensor) -> Float[Tensor, "b n d"]:
        """What stands at the tokens in a value of the point as the model has it."""
        return self.gather(value.reshape(*self.shape, value.shape[-1]))

    def numbers(self) -> Float[Tensor, "rows places"]:
        """Which token of its sample stands at each place; NaN where none does."""
        numbers = torch.full(self.shape, torch.nan)
        order = torch.arange(self.row.shape[1]).expand_as(self.row)
        real = self.real.cpu()
        numbers[self.row.cpu()[real], self.place.cpu()[real]] = order[real].to(numbers)
        return numbers


def ablated_points(model: HookedMM, batch: Batch) -> list[str]:
    """Where tokens must be replaced so that nothing of them is left: first the point whose tokens are counted.

    Raises:
        BadInputError: If the batch has no picture, or the model has no such point.
    """
    if not batch.has_images:
        raise BadInputError("the batch has no picture, so there are no image tokens to replace; give images")
    if bool(batch.mask("image").any()):
        prefix = "" if batch.decoder is None else "encoder."
        between = [name for name in model.hook_names if name.startswith(f"{prefix}blocks.") and name.endswith(INSERTED)]
        return [f"{prefix}hook_embed", *between]
    found = [name for name in BEHIND_TOWER if name in model.hook_points][:1]
    if not found:
        raise BadInputError(
            f"this {model.cfg.family} model has no image positions, and none of the points {', '.join(BEHIND_TOWER)} "
            "that hold its picture; ablate other points with hooked_mm.Replace"
        )
    return found


def image_tokens(point: str, batch: Batch, shape: Sequence[int]) -> ImageTokens:
    """Where the image tokens stand in values of this shape.

    Args:
        point: Of `ablated_points`.
        batch: The batch.
        shape: Of the point's values, the width at the end.

    Raises:
        BadInputError: If places can't be traced to samples and images.
    """
    plan = layout(Hook(point, None, 0, batch), shape)
    chosen = (plan.modality == Modality.IMAGE).expand(plan.shape)
    if plan.patches:
        number = plan.need("image", "image tokens").expand(plan.shape)
    else:
        chosen = chosen & ~batch.separator
        first = torch.stack([(batch.image_sample < sample).sum() for sample in range(len(batch))])
        number = batch.image_index - first[:, None].to(batch.image_index.device)
    sample = plan.need("sample", "image tokens").expand(plan.shape)
    row, place = chosen.nonzero().T
    owner = sample[row, place]
    order = owner.argsort(stable=True)
    counts = owner.bincount(minlength=len(batch))
    start = counts.cumsum(0) - counts
    column = torch.arange(len(owner), device=owner.device) - start[owner[order]]
    found = torch.full((3, len(batch), int(counts.max())), -1, device=owner.device)
    found[:, owner[order], column] = torch.stack([row, place, number[row, place].long()])[:, order]
    return ImageTokens(point, found[0], found[1], found[2], plan.shape)


def token_features(model: HookedMM, batch: Batch) -> tuple[ImageTokens, Float[Tensor, "b n d"]]:
    """The image tokens of a batch and what they hold; no layer of the language model runs.

    Raises:
        BadInputError: As `ablated_points`.
    """
    point = ablated_points(model, batch)[0]
    with torch.no_grad():
        _, cache = model.run_with_cache(batch, point, stop_at_layer=0)
    tokens = image_tokens(point, batch, cache[point].shape)
    return tokens, tokens.held(cache[point])


@dataclass(frozen=True)
class Fill:
    """What replaced tokens become.

    Attributes:
        kind: See the module.
        data: Point -> (d,), for `data`.
        seed: Of the noise: the same seed and key of a sample draw the same noise, whatever else is in the batch.
    """

    kind: FillKind = "mean"
    data: Mapping[str, Float[Tensor, " d"]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(FillKind):
            raise BadInputError(f"tokens can't be replaced by {self.kind!r}; known: {', '.join(get_args(FillKind))}")

    def instead(
        self, values: Float[Tensor, "b n d"], tokens: ImageTokens, keys: Sequence[int] | None = None
    ) -> Float[Tensor, "b n d"]:
        """What stands for each token where it is replaced, in at least float32.

        Args:
            values: The tokens.
            tokens: Whose they are.
            keys: A number per sample that its noise is drawn by; 0 for all unless given.

        Raises:
            BadInputError: If `data` has no vector for the point.
        """
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        if self.kind == "zero":
            return torch.zeros_like(wide)
        if self.kind == "data":
            if tokens.point not in self.data:
                raise BadInputError(
                    f"there is no vector to put in at {tokens.point!r}, only at {', '.join(self.data) or 'no point'}; "
                    "take those of data_means"
                )
            return self.data[tokens.point].to(wide).expand_as(wide)
        mean, scale = moments(wide, tokens)
        if self.kind == "mean":
            return mean
        return mean + scale * _noise(tokens.counts.tolist(), wide.shape, self.seed, keys).to(wide)


def moments(values: Float[Tensor, "b n d"], tokens: ImageTokens) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (divisor n) over the tokens of the image that each token belongs to, (b, n, d)."""
    images = max(1, int(tokens.image.max()) + 1)
    own = torch.nn.functional.one_hot(tokens.image.clamp_min(0), images) * tokens.real[..., None]
    share = own.to(values) / own.sum(1, keepdim=True).clamp_min(1).to(values)
    mean = own.to(values) @ (share.mT @ values)
    spread = (values - mean).square()
    return mean, (own.to(values) @ (share.mT @ spread)).sqrt()


def _noise(counts: Sequence[int], shape: Sequence[int], seed: int, keys: Sequence[int] | None) -> Tensor:
    drawn = torch.zeros(tuple(shape))
    for row, (count, key) in enumerate(zip(counts, keys or [0] * len(counts), strict=True)):
        normal = np.random.default_rng([seed, int(key)]).standard_normal((count, shape[-1]), dtype=np.float32)
        drawn[row, :count] = torch.from_numpy(normal)
    return drawn


def data_means(model: HookedMM, batches: Iterable[Batch]) -> dict[str, Float[Tensor, " d"]]:
    """Mean over all image tokens of all batches, at every point where `Fill` needs one.

    Raises:
        BadInputError: If there are no batches, or one has no picture.
    """
    sums: dict[str, tuple[Tensor, int]] = {}
    for batch in batches:
        points = ablated_points(model, batch)
        with torch.no_grad():
            # Features that enter between layers are only known once these have run.
            _, cache = model.run_with_cache(batch, points, stop_at_layer=0 if len(points) == 1 else None)
        for point in points:
            tokens = image_tokens(point, batch, cache[point].shape)
            total, count = sums.get(point, (torch.zeros(cache[point].shape[-1], dtype=torch.float64), 0))
            own = tokens.held(cache[point]).double().sum((0, 1)).cpu()
            sums[point] = (total + own, count + int(tokens.counts.sum()))
    if not sums:
        raise BadInputError("a mean over a data set was asked for, but no batch was given")
    return {point: (total / count).float() for point, (total, count) in sums.items()}


def replace_tokens(
    points: Sequence[str], gone: Bool[Tensor, "b n"] | None, fill: Fill, keys: Sequence[int] | None = None
) -> list[HookSpec]:
    """Hooks that replace image tokens, for `run_with_hooks`, `hooks` and generation.

    Args:
        points: Of `ablated_points`.
        gone: Which tokens of each sample, in the order of `image_tokens`; None for all.
        fill: By what.
        keys: As in `Fill.instead`.
    """

    def change(value: Tensor, hook: Hook) -> Tensor | None:
        if hook.step > 0 or (gone is not None and not bool(gone.any())):
            return None
        copies = 1 if stream_of(hook.name) == "tower" else value.shape[0] // len(hook.batch)
        # Beam search has copies of a sample one after the other.
        changed = [once(value[copy::copies], hook) for copy in range(copies)]
        return torch.stack(changed, dim=1).flatten(0, 1) if copies > 1 else changed[0]

    def once(value: Tensor, hook: Hook) -> Tensor:
        tokens = image_tokens(hook.name, hook.batch, value.shape)
        if gone is not None and gone.shape != tokens.real.shape:
            raise BadInputError(
                f"tokens to replace are {tuple(gone.shape)}, but the batch has {tuple(tokens.real.shape)} at "
                f"{hook.name!r}; give one flag for each token of `image_tokens`"
            )
        lost = tokens.real if gone is None else gone.to(tokens.real.device)
        chosen = lost & tokens.real
        instead = fill.instead(tokens.held(value), tokens, keys).to(value.dtype)
        changed = value.reshape(*tokens.shape, value.shape[-1]).clone()
        changed[tokens.row[chosen].to(value.device), tokens.place[chosen].to(value.device)] = instead[
            chosen.to(value.device)
        ]
        changed[_fillers(hook, value.shape, (lost | ~tokens.real).all(1)).to(value.device)] = 0
        return changed.reshape(value.shape)

    return [(point, change) for point in points]


def _fillers(hook: Hook, shape: Sequence[int], blank: Bool[Tensor, " b"]) -> Bool[Tensor, "rows places"]:
    """Places that only fill a tower's rows up, of samples of which nothing shall be left.

    Text that stands before a picture reads them in Mllama, and the tower has let them see the picture.
    """
    plan = layout(hook, shape)
    if not plan.patches:
        return torch.zeros(plan.shape, dtype=torch.bool)
    padding = (plan.modality == Modality.PAD).expand(plan.shape)
    return padding & blank.to(padding.device)[plan.need("sample", "image tokens")]


def ablated_scores(
    model: HookedMM,
    batch: Batch,
    targets: Targets,
    gone: Bool[Tensor, "sets n t"],
    fill: Fill | None = None,
    *,
    kind: ScoreKind = "logit",
    keys: Sequence[int] | None = None,
    size: int = 64,
) -> Float64[Tensor, "sets n"]:
    """Scores of targets without sets of tokens; sets run side by side, and each only once.

    Args:
        model: The model.
        batch: Pictures and prompts, with answers where targets stand in them.
        targets: What is predicted.
        gone: Per set and target, which tokens of the target's sample are replaced; none: the score as it is.
        fill: By what; the mean of the image's own tokens unless given.
        kind: The target's logit or log-probability (less its foil's, if it has one), or its probability.
        keys: Per sample of the batch, as in `Fill.instead`.
        size: Samples under one set that run in one pass, at most.

    Raises:
        BadInputError: If sets are not one per target, a target with a foil is asked for its probability, or as
            `ablated_points`.
    """
    if gone.ndim != 3 or gone.shape[1] != len(targets):
        raise BadInputError(
            f"sets of tokens are {tuple(gone.shape)}; they must be (sets, {len(targets)} targets, tokens)"
        )
    if kind == "probability" and targets.foil is not None:
        raise BadInputError("a probability has no foil; ask for kind='logit', or leave foils out")
    fill, points = fill or Fill(), ablated_points(model, batch)
    sets, count = gone.shape[:2]
    own = targets.sample.cpu().expand(sets, count)
    jobs, which = (
        torch.cat([own[..., None].short(), gone.cpu()], dim=-1).flatten(0, 1).unique(dim=0, return_inverse=True)
    )
    found = torch.empty(sets * count, dtype=torch.float64)
    number = torch.arange(count).expand(sets, count).flatten()
    for start in range(0, len(jobs), size):
        samples, part = jobs[start : start + size, 0].tolist(), jobs[start : start + size, 1:].bool()
        mine = ((which >= start) & (which < start + len(samples))).nonzero()[:, 0]
        asked = targets.take(number[mine])
        chosen = None if keys is None else [keys[sample] for sample in samples]
        asked = Targets(which[mine] - start, asked.row, asked.token, asked.foil)
        found[mine] = scores_of(model, batch.take(samples), asked, replace_tokens(points, part, fill, chosen), kind)
    return found.reshape(sets, count)


def scores_of(model: HookedMM, batch: Batch, targets: Targets, hooks: Sequence[HookSpec], kind: ScoreKind) -> Tensor:
    """Scores of targets in one pass, of which only the logits from the first target's row on are made.

    Args:
        model: The model.
        batch: Whose targets they are.
        targets: What is predicted.
        hooks: To run under.
        kind: As in `ablated_scores`.

    Returns:
        (n,) float64.
    """
    with torch.no_grad():
        logits, here = tail_logits(model, batch, targets, hooks)
    scores = here.scores(logits.to(torch.promote_types(logits.dtype, torch.float32)), _LOGITS[kind]).double().cpu()
    return scores.exp() if kind == "probability" else scores


_LOGITS: dict[ScoreKind, Literal["logit", "log_prob"]] = {
    "logit": "logit",
    "log_prob": "log_prob",
    "probability": "log_prob",
}


def effects(scores: Float64[Tensor, "sets n"]) -> Float64[Tensor, "others n"]:
    """What each set costs: the first set's score, of which nothing is gone, less that of each other.

    Args:
        scores: Of `ablated_scores`, the first set empty.
    """
    return scores[:1] - scores[1:]
