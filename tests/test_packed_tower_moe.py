"""Miniatures with packed towers and mixtures of experts: each runs and sees its picture."""

from __future__ import annotations

import pytest

from hooked_mm.testing.packed_tower_moe import RECIPES
from tests.miniature_checks import check_recipe


@pytest.mark.parametrize("family", RECIPES)
def test_it_runs_and_sees_its_picture(family: str) -> None:
    """See `check_recipe`."""
    check_recipe(family)
