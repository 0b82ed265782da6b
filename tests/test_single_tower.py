"""Miniatures of one tower, one projector, one decoder run and see their pictures."""

from __future__ import annotations

import pytest

from hooked_mm.testing.single_tower import RECIPES
from tests.miniature_checks import check_runs


@pytest.mark.parametrize("family", RECIPES)
def test_it_runs_and_sees(family: str) -> None:
    """See `check_runs`."""
    check_runs(family)
