"""Miniatures of several towers, of mixtures of experts and of state spaces."""

from __future__ import annotations

from hooked_mm.testing.recipe import Recipe

RECIPES: dict[str, Recipe] = {}
