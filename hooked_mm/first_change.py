"""Where in a generation hooks first act, or conditions look: in the prompt, at its last position, or behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from hooked_mm.batch import Batch
from hooked_mm.conditions import Condition
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import (
    Add,
    AtPoint,
    Compose,
    HookLike,
    Intervention,
    ProjectOut,
    Replace,
    Rotate,
    Scale,
    SetComponent,
    When,
)
from hooked_mm.positions import At, as_rule
from hooked_mm.runner import NamesFilter, match_names
from hooked_mm.value_layout import stream_of, token_layout

Change = Literal["prompt", "last_prompt", "generated"]
ORDER: tuple[Change, ...] = ("prompt", "last_prompt", "generated")
POSITION_WISE: set[type[AtPoint]] = {Add, Replace, Scale, ProjectOut, SetComponent, Rotate}
"""Interventions known to change a position by what is there alone; of others, subclasses too, that can't be told."""

Kind = TypeVar("Kind", bound=type[AtPoint])


def position_wise(kind: Kind) -> Kind:
    """Class decorator: an intervention of one's own that changes a position by what is there alone."""
    POSITION_WISE.add(kind)
    return kind


def first_changed(hooks: Sequence[HookLike], model: HookedMM, batch: Batch) -> Change:
    """Where in a generation hooks first act, or conditions look.

    Args:
        hooks: Interventions, or functions, of which nothing can be told.
        model: Whose hook points they name.
        batch: The prompts, in which rules of positions are resolved.

    Returns:
        `"prompt"`: before the last prompt position of some sample, or it can't be told; `"last_prompt"`: nowhere before
        the first sample's; `"generated"`: at generated tokens alone.
    """
    found = [_change(hook, model, batch) if isinstance(hook, Intervention) else ORDER[0] for hook in hooks]
    return min(found, key=ORDER.index, default="generated")


def _change(hook: Intervention, model: HookedMM, batch: Batch) -> Change:
    if isinstance(hook, Compose):
        return first_changed(hook.parts, model, batch)
    if isinstance(hook, When):
        points = [act.point for act in hook.intervention.acts() if not act.looks]
        looks = [_looked(hook.condition, point, model, batch) for point in points]
        return min([_change(hook.intervention, model, batch), *looks], key=ORDER.index)
    if type(hook) in POSITION_WISE and isinstance(hook, AtPoint):
        return _at(hook.point, hook.at, model, batch)
    return "prompt"


def _looked(condition: Condition, point: NamesFilter, model: HookedMM, batch: Batch) -> Change:
    """Where a condition looks; one that judges every position by itself is asked only where something acts."""
    place = point if condition.point is None else condition.point
    return _at(place, "generated" if condition.over == "position" else condition.at, model, batch)


def _at(point: NamesFilter, at: At, model: HookedMM, batch: Batch) -> Change:
    points = model.hook_points
    for name in match_names(point, points):
        # A tapped point's keys are those of all positions; what runs once is not reached again.
        if stream_of(name) != "text" or points[name].tap is not None or points[name].once or "xattn" in name:
            return "prompt"
    samples, given = batch.modality.shape
    try:
        mask = as_rule(at).mask(token_layout(str(point), batch, 0, samples, given))
    except BadInputError:
        return "prompt"
    early = mask[:, : start_of(batch)]
    return "prompt" if bool(early.any()) else "last_prompt" if bool(mask.any()) else "generated"


def start_of(batch: Batch) -> int:
    """The first column at which any sample has its last prompt position; all before it is the same for every hook."""
    return int(batch.last_prompt().min())
