"""Miniatures of early fusion and of its makers' other models: each is built, runs, and sees its own picture."""

from __future__ import annotations

import importlib.util

import pytest

from hooked_mm.errors import BadInputError
from hooked_mm.testing import early_fusion, early_fusion_more
from hooked_mm.testing.miniatures import miniature
from tests.miniature_checks import check_runs


@pytest.mark.parametrize("family", {**early_fusion.RECIPES, **early_fusion_more.RECIPES})
def test_runs(family: str) -> None:
    """What needs a package that is not there says so."""
    recipe = {**early_fusion.RECIPES, **early_fusion_more.RECIPES}[family]
    if any(importlib.util.find_spec(package) is None for package in recipe.needs):
        with pytest.raises(BadInputError, match=rf"needs {recipe.needs[0]}.*pip install {recipe.needs[0]}"):
            miniature(family)
    else:
        check_runs(family)
