"""Models to test with: any architecture as a miniature with random weights, built from its own configuration.

from hooked_mm.testing import miniature, miniature_inputs

model = HookedMM(miniature("gemma3"))
logits, cache = model.run_with_cache(miniature_inputs(model.hf_model))
"""

from hooked_mm.testing.miniatures import RECIPES, miniature, miniature_inputs
from hooked_mm.testing.recipe import Recipe

__all__ = ["RECIPES", "Recipe", "miniature", "miniature_inputs"]
