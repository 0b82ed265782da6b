"""Miniatures of several towers, of mixtures of experts and of state spaces run, and see their pictures."""

from __future__ import annotations

import pytest

from hooked_mm.testing import mixed_tower, mixed_tower_ocr
from tests.miniature_checks import check_runs


@pytest.mark.parametrize("family", [*mixed_tower.RECIPES, *mixed_tower_ocr.RECIPES])
def test_runs(family: str) -> None:
    check_runs(family)
