"""Rivals that tests measure against, loaded without what they need for other things."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest


def overcomplete_semi_nmf() -> Any:
    """overcomplete's `SemiNMF` class; skips the test where overcomplete is not installed.

    Its top-level `__init__` imports vision models and torchvision, of which the decompositions use nothing: an empty
    module with the same path stands in for it.
    """
    spec = importlib.util.find_spec("overcomplete") if "overcomplete" not in sys.modules else None
    if spec is not None:
        stand_in = types.ModuleType("overcomplete")
        stand_in.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["overcomplete"] = stand_in
    if "overcomplete" not in sys.modules:
        pytest.skip("overcomplete is not installed: pip install --no-deps overcomplete")
    return importlib.import_module("overcomplete.optimization").SemiNMF
