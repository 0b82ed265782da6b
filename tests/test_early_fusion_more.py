"""Miniatures of Gemma 4, Muse, Inkling 2, Molmo 2, Llama 4 and Janus."""

from __future__ import annotations

import importlib.util

import pytest

from hooked_mm.errors import BadInputError
from hooked_mm.testing.early_fusion_more import RECIPES
from hooked_mm.testing.miniatures import miniature
from tests.miniature_checks import check_runs


@pytest.mark.parametrize("family", [family for family, recipe in RECIPES.items() if not recipe.needs])
def test_runs(family: str) -> None:
    """It is built, runs, and sees its own picture."""
    check_runs(family)


def test_what_needs_a_package_says_so() -> None:
    """Gemma 3n's tower is timm's."""
    if importlib.util.find_spec("timm") is not None:
        pytest.skip("timm is installed")
    with pytest.raises(BadInputError, match=r"'gemma3n' needs timm.*pip install timm"):
        miniature("gemma3n")
