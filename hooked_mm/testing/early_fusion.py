"""Miniatures without a tower of transformers' usual plan: image tokens, raw patches, streams of their own."""

from __future__ import annotations

from hooked_mm.testing.recipe import Recipe

RECIPES: dict[str, Recipe] = {}
