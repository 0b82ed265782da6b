"""Every recipe makes a model that runs and sees its own picture; those that can't be followed say why."""

from __future__ import annotations

import importlib.util

import pytest
from transformers import AutoConfig

from hooked_mm.errors import BadInputError
from hooked_mm.testing.miniatures import RECIPES, miniature
from hooked_mm.testing.recipe import IMAGE_TOKEN, Recipe, image_run
from tests.miniature_checks import check_runs


def missing(made: Recipe) -> str:
    """A package that the architecture needs and that is not here, if any."""
    return next((name for name in made.needs if importlib.util.find_spec(name) is None), "")


@pytest.mark.parametrize("family", RECIPES)
def test_it_runs_and_sees_its_picture(family: str) -> None:
    """See `check_runs`; without a package that it needs, or without a picture, it says so."""
    made = RECIPES[family]
    if made.why_not:
        with pytest.raises(BadInputError, match=rf"no miniature of '{family}': .+"):
            miniature(family)
    elif package := missing(made):
        with pytest.raises(BadInputError, match=f"needs .*{package}.* pip install"):
            miniature(family)
    else:
        check_runs(family)


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
