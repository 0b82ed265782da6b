"""More miniatures of one tower run and see their pictures; those that can't be built say why."""

from __future__ import annotations

import importlib.util

import pytest

from hooked_mm.errors import BadInputError
from hooked_mm.testing.miniatures import miniature
from hooked_mm.testing.single_tower_more import RECIPES
from tests.miniature_checks import check_runs


def missing(family: str) -> str:
    """A package that the architecture needs and that is not here, if any."""
    return next((name for name in RECIPES[family].needs if importlib.util.find_spec(name) is None), "")


@pytest.mark.parametrize("family", [family for family, found in RECIPES.items() if not found.why_not])
def test_it_runs_and_sees(family: str) -> None:
    """See `check_runs`."""
    if package := missing(family):
        with pytest.raises(BadInputError, match=f"needs .*{package}.* pip install"):
            miniature(family)
        pytest.skip(f"{package} is not installed")
    check_runs(family)


def test_a_decoder_of_text_is_refused() -> None:
    """Mistral 4 takes no picture."""
    with pytest.raises(BadInputError, match=r"no miniature of 'mistral4': .*takes no picture"):
        miniature("mistral4")
