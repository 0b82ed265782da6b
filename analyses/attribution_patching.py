"""Attribution patching: what patching every point at every position would do, to first order, in one backward pass.

Nanda 2023 ("Attribution Patching: Activation Patching At Industrial Scale"), Kramar et al. 2024 (arXiv 2403.00745).
With x a point's value at a position in the run that would be patched, x' in the other one, and LD as in
`causal_tracing`:

    LD_patched - LD  ~  (x' - x) . dLD / dx

Two forward passes and one backward pass for all points and positions, where patching takes a pass for each. It is exact
where LD depends on x linearly, and misleads where a softmax or a norm is far from that: check what matters by patching.

`steps` > 0 averages the gradient over runs between the two, in which what enters of the pictures is (1 - a) e + a e' at
the midpoints a = (k + 1/2) / steps (integrated gradients; Hanna et al. 2024, arXiv 2403.17806): a pass forward and back
for each. They enter where `token_ablation` replaces tokens: embeddings, an encoder's, or what cross-attention reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from analyses.causal_tracing import Direction, recovery, run_and_source
from analyses.pair_batches import PairBatch
from analyses.position_groups import Groups
from analyses.tail_logits import in_tail, tail_options
from analyses.token_ablation import ablated_points
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.norms import at_least_float32
from hooked_mm.runner import Hook


def first_order(
    source: Float[Tensor, "... d"], value: Float[Tensor, "... d"], gradient: Float[Tensor, "... d"]
) -> Float[Tensor, "..."]:
    """(x' - x) . g: what a target gains when x becomes x', to first order, in at least float32.

    Args:
        source: x'.
        value: x.
        gradient: Of the target, at x.
    """
    wide = [at_least_float32(one.detach()) for one in (source, value, gradient)]
    return ((wide[0] - wide[1]) * wide[2]).sum(-1)


def _between(mine: Tensor, theirs: Tensor, share: float, value: Tensor, hook: Hook) -> Tensor:
    """A run's values on the way to the other's, for any point."""
    return torch.lerp(mine, theirs, share)


def attributed(
    model: HookedMM, pairs: PairBatch, points: Sequence[str], direction: Direction = "denoise", *, steps: int = 0
) -> Float[Tensor, "points n p"]:
    """What LD would gain if one position of one point were patched, to first order.

    Args:
        model: The model.
        pairs: Their runs.
        points: Hook points of the language model (`causal_tracing.point_names`), all kept at once.
        direction: `denoise`: clean values into the corrupt run; `noise`: corrupt ones into the clean run.
        steps: How many runs between the two the gradient is averaged over; 0 takes it at the run itself.

    Raises:
        BadInputError: If `steps` is negative, a point is none of single positions, or there is none where the pictures
            enter, for runs between.
    """
    if steps < 0:
        raise BadInputError(f"steps={steps}; it is 0 for the plain gradient, or how many runs it is averaged over")
    run, source = run_and_source(pairs, direction)
    points = list(points)
    entries = ablated_points(model, run) if steps else []
    with torch.no_grad():
        last = tail_options(model, source, pairs.targets)
        _, theirs = model.run_with_cache(source, [*points, *entries], **last)
        if steps:
            # The values of the run itself: those of the runs between are others.
            _, mine = model.run_with_cache(run, [*points, *entries], **last)
    found = torch.zeros(len(points), *(run.decoder or run).modality.shape)
    for step in range(max(steps, 1)):
        share = (step + 0.5) / max(steps, 1)
        hooks = [(name, partial(_between, mine[name], theirs[name], share)) for name in entries]
        with torch.enable_grad(), model.hooks(hooks):
            logits, cache = model.run_with_cache(run, points, grad=True, **tail_options(model, run, pairs.targets))
            assert logits is not None
            in_tail(pairs.targets, run, logits).scores(logits).sum().backward()
        for place, point in enumerate(points):
            value = (mine if steps else cache)[point]
            gained = first_order(theirs[point], value, cache.grad(point)) / max(steps, 1)
            if gained.ndim > 2:
                gained = gained.flatten(2).sum(2)
            if gained.shape != found.shape[1:]:
                raise BadInputError(
                    f"{point!r} has values of shape {tuple(value.shape)}, none per position; choose points of the "
                    "stream, of attention's or the MLP's output, or of heads"
                )
            found[place] += gained.cpu()
    return found


def by_group(
    gained: Float[Tensor, "points n p"], groups: Groups, pairs: PairBatch, direction: Direction = "denoise"
) -> Float64[Tensor, "points groups n"]:
    """The recovery to first order, of each group's positions together: to be held against `causal_tracing.traced`.

    Args:
        gained: From `attributed`, of the same direction.
        groups: Masks over the positions.
        pairs: Their runs.
        direction: As there.

    Returns:
        NaN for a pair that has no position of a group.
    """
    masks = torch.stack([mask.cpu() for mask in groups.values()])
    sums = (gained.double()[:, None] * masks[None]).sum(-1)
    start = pairs.corrupt_scores if direction == "denoise" else pairs.clean_scores
    found = recovery(start.double() + sums, pairs.clean_scores, pairs.corrupt_scores, direction)
    return found.masked_fill(~masks.any(-1)[None], torch.nan)
