"""What recipes are made of: keys that configurations know, and runs of image tokens."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from hooked_mm.testing.miniatures import RECIPES
from hooked_mm.testing.recipe import IMAGE_TOKEN, Recipe, image_run


@pytest.mark.parametrize("family", [family for family, made in RECIPES.items() if made.config])
def test_a_configuration_says_nothing_that_its_class_does_not_know(family: str) -> None:
    """A misspelt size would leave the default in its place: every key is one that the configuration has.

    Special tokens and the vocabulary's size are taken by any configuration.
    """
    made = RECIPES[family]
    config = AutoConfig.for_model(family, **made.config)
    known = set(AutoConfig.for_model(family).to_dict()) | {name for name in made.config if hasattr(type(config), name)}
    strange = set(made.config) - known - set(config.attribute_map)
    assert all(name.endswith("_token_id") or name == "vocab_size" for name in strange), strange


def test_an_image_is_a_run_of_image_tokens() -> None:
    """Unless a recipe says otherwise."""
    assert image_run(3) == [IMAGE_TOKEN] * 3
    assert Recipe({}).ids(2) == [IMAGE_TOKEN] * 2
