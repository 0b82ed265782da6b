"""The Pareto front against its definition, every setting compared with every other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from steering.pareto import front

VALUE = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0, math.inf, -math.inf, math.nan]) | st.floats(-2, 2, width=16)
POINTS = st.lists(st.tuples(VALUE, VALUE), max_size=25)


def dominated(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether `other` has at least the effect and at most the damage, and is better in one."""
    better = other[0] > one[0] or other[1] < one[1]
    return other[0] >= one[0] and other[1] <= one[1] and better


@settings(max_examples=400)
@given(points=POINTS, dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_front_is_what_nothing_dominates(points: list[tuple[float, float]], dtype: torch.dtype) -> None:
    """With ties, equal points, infinities and NaN, in any order."""
    effect, damage = torch.tensor(points, dtype=dtype).reshape(-1, 2).unbind(1)
    points = list(zip(effect.tolist(), damage.tolist(), strict=True))
    known = [point for point in points if not any(map(math.isnan, point))]
    expected = [point in known and not any(dominated(point, other) for other in known) for point in points]
    assert front(effect, damage).tolist() == expected


def test_by_hand() -> None:
    """Two settings as good as each other stay; the one that does the same at more damage goes."""
    effect = torch.tensor([0.9, 0.9, 0.9, 0.5, 0.5, 0.2, 1.0, torch.nan])
    damage = torch.tensor([0.1, 0.1, 0.2, 0.0, 0.1, 0.0, 0.3, -1.0])
    assert front(effect, damage).tolist() == [True, True, False, True, False, False, True, False]


def test_one_damage_per_effect() -> None:
    """Else nothing can be said."""
    with pytest.raises(BadInputError, match="one of each"):
        front(torch.zeros(3), torch.zeros(2))
