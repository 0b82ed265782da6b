"""The Pareto front: the settings that no other beats in effect without more damage.

A setting is dominated if another has at least its effect and at most its damage, and is better in one of the two. What
nothing dominates is the front; settings that are equal in both are on it together.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mm.errors import BadInputError


def front(effect: Float[Tensor, " n"], damage: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Which settings are not dominated, in O(n log n).

    Args:
        effect: What shall happen: the more the better.
        damage: What shall not: the less the better.

    Returns:
        A truth per setting. One with a NaN is never on the front and dominates nothing.

    Raises:
        BadInputError: If there is not one damage per effect.
    """
    if effect.shape != damage.shape or effect.ndim != 1:
        raise BadInputError(
            f"effects are {tuple(effect.shape)}, damages {tuple(damage.shape)}; give one of each per setting"
        )
    on_front = torch.zeros(len(effect), dtype=torch.bool, device=effect.device)
    known = (~(effect.isnan() | damage.isnan())).nonzero().squeeze(1)
    if not len(known):
        return on_front
    # By falling effect, and by rising damage where effects are equal.
    by_damage = known[damage[known].argsort()]
    order = by_damage[effect[by_damage].argsort(descending=True, stable=True)]
    sorted_damage = damage[order]
    _, group, sizes = effect[order].unique_consecutive(return_inverse=True, return_counts=True)
    starts = (sizes.cumsum(0) - sizes)[group]
    # A setting must have its group's least damage, and less than all settings of more effect.
    least_before = sorted_damage.cummin(0).values[(starts - 1).clamp_min(0)]
    beaten_before = (starts > 0) & (least_before <= sorted_damage)
    on_front[order] = (sorted_damage == sorted_damage[starts]) & ~beaten_before
    return on_front
