"""Where the hook points of every architecture lie, by hand: the tables of all kinds together."""

from __future__ import annotations

from collections.abc import Callable

from hooked_mm.architectures import FAMILIES
from tests import (
    families,
    families_early_fusion,
    families_encoders_and_cross,
    families_mixed_tower,
    families_packed,
    families_single_tower,
)
from tests.families import Place

_TABLES: tuple[Callable[[], dict[str, Callable[[], dict[str, Place]]]], ...] = (
    lambda: {family: lambda family=family: families.places(family) for family in FAMILIES},
    lambda: {family: lambda family=family: families_packed.places(family) for family in families_packed.FAMILIES},
    lambda: {
        family: lambda family=family: families_early_fusion.places(family) for family in families_early_fusion.FAMILIES
    },
    lambda: {family: model.places for family, model in families_single_tower.MODELS.items()},
    lambda: {family: model.places for family, model in families_mixed_tower.MODELS.items()},
    lambda: {family: model.places for family, model in families_encoders_and_cross.MODELS.items()},
)
BY_HAND: dict[str, Callable[[], dict[str, Place]]] = {k: v for table in _TABLES for k, v in table().items()}
"""Architecture -> its table."""
