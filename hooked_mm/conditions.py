"""Conditions: whether an intervention acts, judged from activations of the same run.

A condition looks at one point and compares the activation x with a direction u of length 1: the dot product x·u, or
the cosine x·u / |x|. It answers per position, or once per sample from the prompt and then for the whole generation.
Conditions keep nothing; `Intervention.when` remembers their answers for one run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.positions import ALL, At, as_rule
from hooked_mm.runner import Hook
from hooked_mm.value_layout import has_heads, layout
from hooked_mm.vectors import one_direction, shown, wide

Over = Literal["position", "any", "mean"]


@dataclass(frozen=True, eq=False, repr=False)
class Condition(ABC):
    """A projection compared with a threshold.

    Attributes:
        direction: (d,); only its direction counts.
        threshold: What the projection is compared with.
        point: Where to look; it must be reached before the intervention acts. None looks at the intervention's own
            points, at the values before it changes them.
        over: `"position"`: each position is judged by itself, at every step. `"any"`: a sample passes, whole and for
            the whole generation, if any of its prompt's positions does. `"mean"`: as `"any"`, judged by the mean
            activation over the prompt's positions.
        at: The positions looked at; others do not pass, and do not count.
        cosine: Compare the cosine instead of the dot product.

    Raises:
        BadInputError: If the direction is no vector or zero, `over` is unknown, or `point` is a pattern.
    """

    direction: Float[Tensor, " d"]
    threshold: float
    point: str | None = None
    over: Over = "position"
    at: At = ALL
    cosine: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", one_direction("direction", self.direction))
        object.__setattr__(self, "at", as_rule(self.at))
        if self.over not in ("position", "any", "mean"):
            raise BadInputError(f"over={self.over!r}; it must be 'position', 'any' or 'mean'")
        if self.point is not None and any(sign in self.point for sign in "*?["):
            raise BadInputError(
                f"point={self.point!r} is a pattern; a condition looks at one point, give its full name"
            )

    @abstractmethod
    def passes(self, projection: Tensor) -> Tensor:
        """Which projections meet the condition."""

    def judge(self, value: Tensor, hook: Hook) -> Bool[Tensor, "..."]:
        """The answer for one activation.

        Returns:
            (rows, positions) for `over="position"`, else (samples,).

        Raises:
            BadInputError: If the point has heads, or vectors of another length than the direction.
        """
        if has_heads(hook.name) or value.shape[-1] != self.direction.shape[0]:
            raise BadInputError(
                f"{self!r} can't look at {hook.name!r} of shape {tuple(value.shape)}: it needs (rows, positions, "
                f"{self.direction.shape[0]}); give the condition a point="
            )
        where = layout(hook, value.shape)
        mask = as_rule(self.at).mask(where).to(value.device)
        value = wide(value).reshape(*where.shape, -1)
        if self.over == "position":
            return self.passes(self._projection(value)) & mask
        rows, columns = mask.nonzero(as_tuple=True)
        sample = where.need("sample", f"over={self.over!r}").to(value.device).expand(mask.shape)[rows, columns]
        chosen = value[rows, columns]
        if self.over == "any":
            hits = sample[self.passes(self._projection(chosen))]
            return torch.zeros(where.samples, dtype=torch.bool, device=value.device).index_fill(0, hits, True)
        count = torch.zeros(where.samples, device=value.device).index_add(
            0, sample, torch.ones_like(chosen[:, 0]).float()
        )
        total = chosen.new_zeros(where.samples, chosen.shape[1]).index_add(0, sample, chosen)
        mean = total / count.clamp_min(1)[:, None].to(total)
        return self.passes(self._projection(mean)) & (count > 0)

    def _projection(self, value: Tensor) -> Tensor:
        projection = value @ self.direction.to(value)
        return projection / value.norm(dim=-1).clamp_min(torch.finfo(value.dtype).tiny) if self.cosine else projection

    def __repr__(self) -> str:
        return shown(self)


@dataclass(frozen=True, eq=False, repr=False)
class Above(Condition):
    """Passes where the projection is greater than the threshold (Lee et al. 2024, arXiv 2409.05907, with
    `over="mean"` and `cosine=True`, there with the cosine's absolute value)."""

    def passes(self, projection: Tensor) -> Tensor:
        """Which projections meet the condition."""
        return projection > self.threshold


@dataclass(frozen=True, eq=False, repr=False)
class Below(Condition):
    """Passes where the projection is smaller than the threshold."""

    def passes(self, projection: Tensor) -> Tensor:
        """Which projections meet the condition."""
        return projection < self.threshold
