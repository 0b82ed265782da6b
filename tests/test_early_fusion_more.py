"""Miniatures of Gemma 4, Muse, Inkling and their kin: each runs and sees its picture."""

from __future__ import annotations

import pytest

from hooked_mm.testing.early_fusion_more import RECIPES
from tests.miniature_checks import check_recipe


@pytest.mark.parametrize("family", RECIPES)
def test_it_runs_and_sees_its_picture(family: str) -> None:
    """See `check_recipe`."""
    check_recipe(family)
