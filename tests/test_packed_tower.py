"""Miniatures whose tower takes all images' patches as one sequence: each runs and sees its picture."""

from __future__ import annotations

import pytest

from hooked_mm.testing import packed_tower, packed_tower_moe, packed_tower_more
from tests.miniature_checks import check_runs


@pytest.mark.parametrize("family", [*packed_tower.RECIPES, *packed_tower_more.RECIPES, *packed_tower_moe.RECIPES])
def test_it_runs_and_sees_its_picture(family: str) -> None:
    check_runs(family)
