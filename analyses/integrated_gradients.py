"""Integrated gradients: what each place of an input adds to a token's score, such that all of it adds up.

Sundararajan et al. 2017 (arXiv 1703.01365). From a baseline x' to the input x, with f a token's score,

    IG_i = (x_i - x'_i) * integral over a from 0 to 1 of  df/dx_i (x' + a (x - x')) da

and the sum of all IG_i is f(x) - f(x'). The integral is a weighted sum over steps: Gauss and Legendre's (exact for
polynomials in a of degree 2 * steps - 1), or midpoints. What the sum lacks is reported with every result. One step at
the input itself is gradient x input, which adds up to nothing in particular.

x are the image features where they enter the language model (`hook_embed` at image positions), the values at another
point, or pixels. A norm in front of the first layer makes features of a thousandth of the size look like the features
themselves, so from a baseline of zero f jumps right behind it, where even steps see nothing: the mean of the picture's
own features is the default, and `graded` steps (a = u^4, Gauss in u) crowd near the baseline for zero. Where a mixture
chooses other experts on the way, f jumps, which no gradient sees. All targets of a sample share their passes; a pass
never holds more than `size` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from analyses.pattern_gradients import places_by_round
from analyses.targets import Kind, Targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.norms import at_least_float32
from hooked_mm.positions import IMAGE, At, as_rule
from hooked_mm.runner import Hook
from hooked_mm.value_layout import layout

Rule = Literal["gauss", "midpoint", "graded", "end"]
GRADE = 4
Baseline = Literal["zero", "mean"] | Tensor
PIXELS = "pixel_values"
"""In place of a hook point: the picture as the processor made it."""
TOLERANCE = 0.01
"""Share of f(x) - f(x') that attributions may lack before a note says so."""


def steps_of(rule: Rule, steps: int) -> tuple[Float64[Tensor, " s"], Float64[Tensor, " s"]]:
    """Places between 0 and 1, and their weights, which sum to 1.

    Args:
        rule: `gauss`, `midpoint`; `graded`, near 0 for the most part; or `end`, the input alone.
        steps: How many; one for `end`.

    Raises:
        BadInputError: For another rule, or no steps.
    """
    if rule not in get_args(Rule) or steps < 1 or (rule == "end" and steps != 1):
        raise BadInputError(
            f"rule={rule!r} with {steps} steps; it is one of {get_args(Rule)} with at least one step, 'end' with one"
        )
    if rule == "end":
        return torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    if rule == "midpoint":
        return (torch.arange(steps, dtype=torch.float64) + 0.5) / steps, torch.full(
            (steps,), 1 / steps, dtype=torch.float64
        )
    places, weights = np.polynomial.legendre.leggauss(steps)
    even, share = torch.from_numpy((places + 1) / 2), torch.from_numpy(weights / 2)
    return (even, share) if rule == "gauss" else (even**GRADE, share * GRADE * even ** (GRADE - 1))


def integrate(
    score: Callable[[Float[Tensor, "m ..."]], Float[Tensor, " m"]],
    value: Float[Tensor, "..."],
    baseline: Float[Tensor, "..."],
    *,
    steps: int = 32,
    rule: Rule = "gauss",
    size: int = 16,
) -> Float[Tensor, "..."]:
    """IG of any function of a tensor.

    Args:
        score: f of m inputs at once, each by itself.
        value: x.
        baseline: x', of its shape.
        steps: Of the path.
        rule: As in `steps_of`.
        size: Steps at once.
    """
    places, weights = (found.to(value) for found in steps_of(rule, steps))
    total = torch.zeros_like(value)
    for start in range(0, steps, size):
        part = slice(start, start + size)
        along = places[part].reshape(-1, *[1] * value.ndim)
        path = (baseline + along * (value - baseline)).detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad((score(path) * weights[part]).sum(), path)
        total += gradient.sum(0)
    return (value - baseline) * total


@dataclass(frozen=True)
class Integrated:
    """Attributions of every target.

    Attributes:
        targets: The tokens, n of them.
        scores: (n,), f(x).
        baseline_scores: (n,), f(x').
        values: Per target: of a hook point, a number per position of the sample (per place of its rows of the tower),
            zero where nothing was varied; of pixels, as `pixel_values` has them.
        error: (n,), the sum of the values less f(x) - f(x').
        notes: What a reader must know.
    """

    targets: Targets
    scores: Float[Tensor, " n"]
    baseline_scores: Float[Tensor, " n"]
    values: list[Float[Tensor, "..."]]
    error: Float[Tensor, " n"]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Varied:
    """What is varied of one sample: x, and where its rows stand among all places of the sample; None for pixels."""

    value: Tensor
    places: Tensor | None
    size: int


def integrated_gradients(
    model: HookedMM,
    batch: Batch,
    targets: Targets,
    *,
    point: str | None = None,
    at: At = IMAGE,
    baseline: Baseline = "mean",
    steps: int = 32,
    rule: Rule = "gauss",
    size: int = 16,
    kind: Kind = "logit",
) -> Integrated:
    """What image features (or pixels) add to each target's score.

    Args:
        model: The model.
        batch: With answers that hold the targets.
        targets: The tokens to explain, from `targets.answer_targets`.
        point: Where x is: a hook point of (row, position, width), or `"pixel_values"`. Unless given, where features
            enter the text: `hook_embed`, an encoder's, or `projector.hook_out` where they are read by cross-attention.
        at: Which positions are varied; those of images.
        baseline: x': the mean of the sample's own varied positions; zero; or values, (width,). Of pixels always zero,
            the mean picture that processors subtract.
        steps: Of the path; each is a forward and a backward pass of one row.
        rule: As in `steps_of`.
        size: Rows of a pass at most: what memory is bounded by.
        kind: The token's logit or log-probability.

    Raises:
        BadInputError: If there is no such point, a sample has none of the positions, or pixels can't be told apart by
            sample.
    """
    point = point or default_point(model, batch)
    with torch.no_grad():
        if point == PIXELS:
            varied, logits = _pixels(model, batch, baseline)
        else:
            varied, logits = _features(model, batch, point, at)
    assert logits is not None
    starts = [_baseline(one, "zero" if point == PIXELS else baseline) for one in varied]
    run = _Run(model, batch, point, at, targets, kind)
    places, weights = steps_of(rule, steps)
    samples = sorted(set(targets.sample.tolist()))
    with torch.no_grad():
        ends = {}
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            found = run.logits(part, [starts[sample] for sample in part])
            for number, sample in enumerate(part):
                for target in (targets.sample == sample).nonzero()[:, 0].tolist():
                    ends[target] = run.scores(found, [number], [target])
    totals = [torch.zeros(0)] * len(targets)
    jobs = [(sample, step) for sample in samples for step in range(steps)]
    for start in range(0, len(jobs), size):
        part_jobs = jobs[start : start + size]
        path = [
            (starts[sample] + float(places[step]) * (varied[sample].value - starts[sample])).requires_grad_()
            for sample, step in part_jobs
        ]
        with torch.enable_grad():
            logits_here = run.logits([sample for sample, _ in part_jobs], path)
        for own, numbers, more in run.rounds([sample for sample, _ in part_jobs]):
            with torch.enable_grad():
                scores = run.scores(logits_here, own, numbers)
                total = (scores * weights[[part_jobs[row][1] for row in own]].to(scores)).sum()
            gradients = torch.autograd.grad(total, [path[row] for row in own], retain_graph=more)
            for number, gradient in zip(numbers, gradients, strict=True):
                kept = totals[number]
                totals[number] = gradient.detach() if not kept.numel() else kept + gradient
    values, sums = [], []
    for number, sample in enumerate(targets.sample.tolist()):
        one = (varied[sample].value - starts[sample]) * totals[number]
        sums.append(one.sum().cpu())
        values.append(_placed(one, varied[sample]).cpu())
    scores = targets.scores(logits, kind).cpu().to(sums[0])
    first = torch.stack([ends[number][0] for number in range(len(targets))]).cpu().to(sums[0])
    error = torch.stack(sums) - (scores - first)
    notes = _notes(error, scores - first, rule)
    if point != PIXELS and any(block.inserted for block in model.structure.text.blocks):
        notes += (
            f"features also enter behind layers of this model's text, where they stay as they are: {point} alone",
        )
    return Integrated(targets, scores, first, values, error, notes)


def gradient_times_input(model: HookedMM, batch: Batch, targets: Targets, **options: object) -> Integrated:
    """x * df/dx: one step of `integrated_gradients`, of which it takes the options, from zero unless told otherwise."""
    return integrated_gradients(model, batch, targets, **{"baseline": "zero", **options}, rule="end", steps=1)  # type: ignore[arg-type]


def default_point(model: HookedMM, batch: Batch) -> str:
    """Where image features enter the text.

    Raises:
        BadInputError: If that is no point of this model.
    """
    point = "hook_embed" if batch.decoder is None else "encoder.hook_embed"
    if batch.layout.kind == "cross":
        point = "projector.hook_out"
    if point not in model.hook_points:
        raise BadInputError(f"this {model.cfg.family} model has no point {point!r} where features enter; give point=")
    return point


class _Run:
    """Runs rows of varied inputs, and scores targets in them."""

    def __init__(self, model: HookedMM, batch: Batch, point: str, at: At, targets: Targets, kind: Kind) -> None:
        self.model, self.batch, self.point, self.at = model, batch, point, at
        self.targets, self.kind = targets, kind
        self._rounds = places_by_round(targets)

    def logits(self, samples: Sequence[int], values: Sequence[Tensor]) -> Tensor:
        """Of rows that are these samples with these values in place of their own."""
        rows = self.batch.take(samples)
        if self.point == PIXELS:
            pixels = torch.cat(list(values)).to(rows.inputs[PIXELS].dtype)
            found = self.model.run_with_hooks(rows.with_inputs({**rows.inputs, PIXELS: pixels}))
        else:

            def write(value: Tensor, hook: Hook) -> Tensor:
                plan = layout(hook, value.shape)
                mask = as_rule(self.at).mask(plan).to(value.device)
                new = value.reshape(*plan.shape, -1).clone()
                new[mask] = torch.cat(list(values)).to(new)
                return new.reshape(value.shape)

            found = self.model.run_with_hooks(rows, [(self.point, write)])
        assert found is not None
        return found

    def scores(self, logits: Tensor, rows: Sequence[int], numbers: Sequence[int]) -> Tensor:
        """Of targets, each in a row of its sample."""
        own = self.targets.take(numbers)
        return Targets(torch.tensor(rows), own.row, own.token, own.foil).scores(logits, self.kind)

    def rounds(self, samples: Sequence[int]) -> list[tuple[list[int], list[int], bool]]:
        """Rows, the target of each, and whether more follow; a round holds one target of each sample."""
        found = []
        for places in self._rounds:
            of = {int(self.targets.sample[number]): number for number in places.tolist()}
            rows = [row for row, sample in enumerate(samples) if sample in of]
            if rows:
                found.append((rows, [of[samples[row]] for row in rows]))
        return [(rows, numbers, place + 1 < len(found)) for place, (rows, numbers) in enumerate(found)]


def _features(model: HookedMM, batch: Batch, point: str, at: At) -> tuple[list[_Varied], Tensor | None]:
    """x of every sample at a hook point."""
    logits, cache = model.run_with_cache(batch, point)
    value = cache[point]
    hook = Hook(point, model.hook_points[point].layer, 0, batch)
    plan = layout(hook, value.shape)
    mask = as_rule(at).mask(plan).to(value.device)
    owner = plan.need("sample", "attribution").to(value.device).expand(plan.shape)
    sheet = at_least_float32(value.reshape(*plan.shape, -1))
    made = []
    for sample in range(len(batch)):
        own = owner == sample
        chosen = mask & own
        if not bool(chosen.any()):
            raise BadInputError(f"has no position of {at!r} at {point!r} to attribute to", sample)
        # Among all places of the sample's rows, those that are varied.
        rows = own.any(dim=1)
        places = chosen[rows].flatten() if plan.shape[0] > 1 or len(batch) == 1 else chosen[own]
        made.append(_Varied(sheet[chosen], places.nonzero()[:, 0], len(places)))
    return made, logits


def _pixels(model: HookedMM, batch: Batch, baseline: Baseline) -> tuple[list[_Varied], Tensor | None]:
    """x of every sample: its rows of `pixel_values`."""
    if PIXELS not in batch.inputs:
        raise BadInputError(f"the batch has no {PIXELS!r} among {sorted(batch.inputs)}; attribute to features instead")
    if isinstance(baseline, Tensor):
        raise BadInputError("pixels have one baseline, zero, the mean picture that processors subtract; leave it out")
    each = [at_least_float32(batch.take([sample]).inputs[PIXELS]) for sample in range(len(batch))]
    whole = batch.inputs[PIXELS]
    if sum(len(one) for one in each) != len(whole) or not torch.equal(torch.cat(each), at_least_float32(whole)):
        raise BadInputError(
            f"which part of {PIXELS!r} {tuple(whole.shape)} is a sample's can't be told; attribute to features instead"
        )
    return [_Varied(one, None, one.numel()) for one in each], model.run_with_hooks(batch)


def _baseline(varied: _Varied, baseline: Baseline) -> Tensor:
    """x' of one sample.

    Raises:
        BadInputError: If values do not fit.
    """
    value = varied.value
    if isinstance(baseline, Tensor):
        if baseline.shape != value.shape[-1:]:
            raise BadInputError(f"a baseline of shape {tuple(baseline.shape)} for values of width {value.shape[-1]}")
        return baseline.to(value).expand_as(value)
    if baseline not in ("zero", "mean"):
        raise BadInputError(f"baseline={baseline!r}; it is 'zero', 'mean' or values of one position")
    if baseline == "mean" and len(value) == 1:
        raise BadInputError("the only image position of a sample is its own mean; take baseline='zero', rule='graded'")
    return torch.zeros_like(value) if baseline == "zero" else value.mean(0, keepdim=True).expand_as(value)


def _placed(values: Tensor, varied: _Varied) -> Tensor:
    """Summed over the width, at all places of the sample; pixels as they are."""
    if varied.places is None:
        return values
    found = values.new_zeros(varied.size)
    found[varied.places] = values.sum(-1)
    return found


def _notes(error: Tensor, gained: Tensor, rule: Rule) -> tuple[str, ...]:
    lacking = error.abs() > TOLERANCE * gained.abs()
    if rule == "end" or not bool(lacking.any()):
        return ()
    return (
        f"attributions of {int(lacking.sum())} of {len(error)} targets miss f(x) - f(baseline) by more than "
        f"{TOLERANCE:.0%} (at most by {float(error.abs().max()):.3g}); take more steps, 'graded' "
        "ones for a baseline of zero",
    )
