"""What every miniature must do, whatever its architecture: run, see its own picture and nobody else's, hide nothing."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hooked_mm.testing.miniatures import miniature, miniature_inputs


@functools.cache
def shared(family: str) -> Any:
    """A miniature (shared: leave it as it is)."""
    return miniature(family)


def picture_tensors(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point inputs, which hold pictures."""
    return {name: value for name, value in inputs.items() if value.is_floating_point()}


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
        # Empty crops and tiles are all zero and stay so.
        other = model(**{**inputs, **{n: torch.where(v == 0, 0.0, 1 - v) for n, v in pictures.items()}}).logits
    assert ((other - logits).abs().flatten(1).amax(dim=1) > 1e-4).all()
