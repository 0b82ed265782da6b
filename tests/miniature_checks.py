"""What every miniature must do, whatever its architecture: run, see its own picture and nobody else's, hide nothing."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.testing.miniatures import RECIPES, miniature, miniature_inputs


@functools.cache
def shared(family: str) -> Any:
    """A miniature (shared: leave it as it is)."""
    return miniature(family)


def picture_tensors(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point inputs, which hold pictures (boxes on a page aside)."""
    return {name: value for name, value in inputs.items() if value.is_floating_point() and name != "bbox"}


def other_picture(name: str, value: Tensor) -> Tensor:
    """Another picture of the same form: empty crops and tiles are all zero and stay so, places stay places."""
    other = torch.where(value == 0, 0.0, 1 - value)
    if name == "flattened_patches":
        other[..., :2] = value[..., :2]
    return other


def check_runs(family: str) -> None:
    """Logits are finite and the same twice; other pictures change every sample's logits; no parameter is a constant."""
    model = shared(family)
    for name, value in model.named_parameters():
        assert value.isfinite().all(), name
        assert value.numel() == 1 or value.std() > 1e-3, name
    inputs = miniature_inputs(model, family=family)
    pictures = picture_tensors(inputs)
    assert pictures, "no picture among the inputs"
    with torch.no_grad():
        logits = model(**inputs).logits
        assert logits.isfinite().all()
        assert torch.equal(logits, model(**inputs).logits)
        other = model(**{**inputs, **{name: other_picture(name, value) for name, value in pictures.items()}}).logits
    assert ((other - logits).abs().flatten(1).amax(dim=1) > 1e-4).all()


def check_recipe(family: str) -> None:
    """A recipe makes a miniature that runs; without a package that it needs, or without a picture, it says so."""
    made = RECIPES[family]
    missing = next((name for name in made.needs if importlib.util.find_spec(name) is None), "")
    if made.why_not:
        with pytest.raises(BadInputError, match=rf"no miniature of '{family}': .+"):
            miniature(family)
    elif missing:
        with pytest.raises(BadInputError, match=f"needs .*{missing}.* pip install"):
            miniature(family)
    else:
        check_runs(family)
