"""Activation patching: which positions, at which layer, carry what tells two pictures apart.

Vig et al. 2020 (arXiv 2004.12265), Meng et al. 2022 (arXiv 2202.05262). A clean and a corrupt run are given the same
words; LD is the logit of the clean answer less that of the corrupt one at the row that predicts either. One point's
values at one group of positions are put from one run into the other:

    denoise    clean values into the corrupt run    (LD_patched - LD_corrupt) / (LD_clean - LD_corrupt)
    noise      corrupt values into the clean run    (LD_clean - LD_patched) / (LD_clean - LD_corrupt)

0: the patch changes nothing; 1: it brings (takes) all. Means over pairs, with bootstrap intervals over pairs. What is
sufficient shows under `denoise`, what is necessary under `noise`.

Control: the same with the two runs of *another* pair, whose answers are others, in the place of one's own:

    (LD_{with another's clean values} - LD_{with its corrupt values}) / (LD_clean - LD_corrupt)

which with the pair's own runs is the recovery itself, since its corrupt values change nothing in the corrupt run.
Patching another pair's clean values alone would be no control: a run that is made to say a third answer prefers
neither of the two, and half of the difference would seem to have come back.

Only one point is kept per pass, so memory does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from analyses.pair_batches import PairBatch
from analyses.position_groups import Groups, Masked
from analyses.tail_logits import tail_logits
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import Interval, bootstrap
from hooked_mm.patching import Patch
from hooked_mm.value_layout import stream_of

Direction = Literal["denoise", "noise"]
COMPONENTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "xattn_out")


def recovery(
    patched: Float[Tensor, "*s n"],
    clean: Float[Tensor, " n"],
    corrupt: Float[Tensor, " n"],
    direction: Direction = "denoise",
) -> Float64[Tensor, "*s n"]:
    """Which share of the difference between two runs a patch brings back (`denoise`) or takes away (`noise`).

    Args:
        patched: LD of patched runs, per pair.
        clean: LD of the clean run.
        corrupt: LD of the corrupt run.
        direction: See the module.

    Returns:
        NaN where the two runs do not differ.

    Raises:
        BadInputError: For an unknown direction.
    """
    if direction not in ("denoise", "noise"):
        raise unknown("direction", direction, ("denoise", "noise"))
    whole = clean.double() - corrupt.double()
    part = patched.double() - corrupt.double() if direction == "denoise" else clean.double() - patched.double()
    return torch.where(whole == 0, torch.nan, part / whole)


def point_names(
    model: HookedMM, components: Sequence[str], layers: Sequence[int] | None = None, *, tower: bool = False
) -> dict[str, str]:
    """Hook names of components of blocks, layer by layer: name -> component.

    Args:
        model: The model.
        components: Of `COMPONENTS`, or any other point of a block: `attn.hook_z`, ...
        layers: Numbers from 0; all unless given.
        tower: Of the vision tower's blocks instead of the language model's.

    Raises:
        BadInputError: If a layer does not exist, or no layer that is asked for has a component.
    """
    stack = model.cfg.vision if tower else model.cfg
    if stack is None:
        raise BadInputError(f"this {model.cfg.family} model has no vision tower")
    count, prefix = stack.n_layers, "vision." if tower else ""
    asked = list(range(count)) if layers is None else list(layers)
    if wrong := [layer for layer in asked if not 0 <= layer < count]:
        raise BadInputError(f"layer {wrong[0]} was asked for; this model has the layers 0 to {count - 1}")
    found: dict[str, str] = {}
    for component in components:
        inner = component if "hook_" in component else f"hook_{component}"
        names = [name for layer in asked if (name := f"{prefix}blocks.{layer}.{inner}") in model.hook_points]
        if not names:
            raise BadInputError(
                f"no layer of this {model.cfg.family} model has a component {component!r}: {prefix}blocks.*.{inner} "
                f"is none of its points; components are {', '.join(COMPONENTS)}, and what else model.hook_names lists"
            )
        found |= dict.fromkeys(names, component)
    return found


def partners(pairs: PairBatch) -> list[int]:
    """For every pair another one, whose answers are none of its own; refused where there is none.

    Raises:
        BadInputError: If for some pair all others share an answer with it.
    """
    answers, found = [set(pair.answers) for pair in pairs.pairs], []
    for number, own in enumerate(answers):
        others = [(number + step) % len(answers) for step in range(1, len(answers))]
        other = next((other for other in others if not own & answers[other]), None)
        if other is None:
            raise BadInputError(
                f"pair {pairs.pairs[number].id!r} shares an answer with each of the {len(answers) - 1} others in its "
                "batch, so none is a control for it; take larger batches, or no control"
            )
        found.append(other)
    return found


def stretched(
    values: Float[Tensor, "b p d"],
    mask: Bool[Tensor, "b p"],
    order: Sequence[int],
) -> Float[Tensor, "b p d"]:
    """Values in which each sample has another's at a group of positions: first at first, last at last, evenly between.

    Groups need not be of one size: of n positions the k-th takes from the (k m // n)-th of the other's m.

    Args:
        values: Of one point.
        mask: The group.
        order: Whose values each sample gets. A sample whose partner has no such position keeps its own.
    """
    made = values.clone()
    for sample, other in enumerate(order):
        here, there = mask[sample].nonzero()[:, 0], mask[other].nonzero()[:, 0]
        if len(here) and len(there):
            taken = there[torch.arange(len(here), device=there.device) * len(there) // len(here)]
            made[sample, here] = values[other, taken]
    return made


def patched_scores(
    model: HookedMM,
    pairs: PairBatch,
    points: Sequence[str],
    groups: Groups,
    direction: Direction = "denoise",
) -> Float[Tensor, "points groups n"]:
    """LD of every pair with one point's values at one group of positions from its other run.

    Args:
        model: The model.
        pairs: Their runs.
        points: Hook points (`point_names`), of the language model or of the tower.
        groups: Masks over the positions (`pair_groups`), one patch each; the same in both runs. At points of the tower
            masks over its patches (`pair_patches`).
        direction: `denoise` runs the corrupt batch and patches clean values into it, `noise` the other way round.

    Returns:
        NaN for a pair that has no position of a group.
    """
    run, source = run_and_source(pairs, direction)
    return _patched(model, pairs, points, groups, run, source, None)


def control_scores(
    model: HookedMM, pairs: PairBatch, points: Sequence[str], groups: Groups, order: Sequence[int] | None = None
) -> Float[Tensor, "points groups n"]:
    """LD of the corrupt run with another pair's clean values, less that with the same pair's corrupt values.

    Args:
        model: The model.
        pairs: Their runs.
        points: Of the language model: in a tower patches of pictures of other shapes have no counterpart.
        groups: As in `patched_scores`.
        order: Each pair's other one; `partners` unless given.

    Returns:
        To be divided by LD_clean - LD_corrupt; NaN for a pair that has no position of a group.

    Raises:
        BadInputError: If a pair has no partner, or a point lies in the tower.
    """
    if inside := [point for point in points if stream_of(point) == "tower"]:
        raise BadInputError(
            f"{inside[0]!r} lies in the tower, whose patches of one picture have no counterpart in another's; control "
            "at points of the language model"
        )
    other = partners(pairs) if order is None else list(order)
    clean, corrupt = (
        _patched(model, pairs, points, groups, pairs.corrupt, source, other) for source in (pairs.clean, pairs.corrupt)
    )
    return clean - corrupt


def run_and_source(pairs: PairBatch, direction: Direction) -> tuple[Batch, Batch]:
    """What is run, and where values are taken from."""
    if direction not in ("denoise", "noise"):
        raise unknown("direction", direction, ("denoise", "noise"))
    return (pairs.corrupt, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupt)


def _patched(
    model: HookedMM,
    pairs: PairBatch,
    points: Sequence[str],
    groups: Groups,
    run: Batch,
    source: Batch,
    order: Sequence[int] | None,
) -> Float[Tensor, "points groups n"]:
    found = torch.full((len(points), len(groups), len(pairs)), torch.nan)
    with torch.no_grad():
        for place, point in enumerate(points):
            tower, layer = stream_of(point) == "tower", model.hook_points[point].layer
            stop = 0 if tower else None if layer is None else layer + 1
            _, cache = model.run_with_cache(source, point, stop_at_layer=stop)
            values = cache[point]
            for number, mask in enumerate(groups.values()):
                rule = Masked.of_patches(run, mask) if tower else Masked.of_positions(run, mask)
                given = values if order is None else stretched(values, mask, order)
                logits, own = tail_logits(model, run, pairs.targets, [Patch(point, given, rule, batch=source)])
                found[place, number] = own.scores(logits).float().cpu()
                there = patch_samples(run, mask) if tower else mask.any(1)
                found[place, number, ~there.cpu()] = torch.nan
    return found


def patch_samples(batch: Batch, mask: Bool[Tensor, "rows places"]) -> Bool[Tensor, " b"]:
    """Which samples have a patch of a mask over the tower's rows."""
    owners = batch.layout.owners(*mask.shape).to(mask.device)[mask]
    found = torch.zeros(len(batch), dtype=torch.bool, device=mask.device)
    found[batch.layout.image_sample.to(mask.device)[owners[owners >= 0]]] = True
    return found


def traced(
    model: HookedMM,
    pairs: PairBatch,
    points: Sequence[str],
    groups: Groups,
    direction: Direction = "denoise",
) -> Float64[Tensor, "points groups n"]:
    """The recovery of every pair, at every point and group; see `patched_scores`."""
    patched = patched_scores(model, pairs, points, groups, direction)
    return recovery(patched, pairs.clean_scores, pairs.corrupt_scores, direction)


def control(
    model: HookedMM, pairs: PairBatch, points: Sequence[str], groups: Groups, order: Sequence[int] | None = None
) -> Float64[Tensor, "points groups n"]:
    """What the same patches bring back with another pair's runs; see `control_scores`."""
    whole = pairs.clean_scores.double() - pairs.corrupt_scores.double()
    return control_scores(model, pairs, points, groups, order).double() / torch.where(whole == 0, torch.nan, whole)


def joined(parts: Sequence[Mapping[str, Float64[Tensor, "points n"]]]) -> dict[str, Float64[Tensor, "points n"]]:
    """What batches of pairs gave per group, one behind the other; NaN where a batch has no such group."""
    names = dict.fromkeys(name for part in parts for name in part)
    made = {}
    for name in names:
        columns = [part.get(name, torch.full_like(next(iter(part.values())), torch.nan)) for part in parts]
        made[name] = torch.cat(columns, dim=1)
    return made


def over_pairs(values: Float64[Tensor, "points n"], draws: int = 1000, seed: int = 0) -> Interval:
    """The mean over pairs at every point, with its bootstrap interval; NaN where no pair has the group.

    Raises:
        BadInputError: If there are no pairs.
    """
    return bootstrap(values.T, draws=draws, seed=seed)
