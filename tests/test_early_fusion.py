"""Miniatures of early fusion: image tokens, raw patches, a robot's policy."""

from __future__ import annotations

import pytest

from hooked_mm.testing.early_fusion import RECIPES
from tests.miniature_checks import check_runs


@pytest.mark.parametrize("family", RECIPES)
def test_runs(family: str) -> None:
    """It is built, runs, and sees its own picture."""
    check_runs(family)
