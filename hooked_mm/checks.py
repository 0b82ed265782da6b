"""One thing that was checked of a model, and how exactly two values must agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["holds", "fails", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        what: The equation or property, in words.
        point: The hook point that it vouches for.
        verdict: Whether it holds; `not applicable` follows from a kind of model, which `detail` states.
        error: Largest deviation, relative to the largest value; None where nothing was compared.
        detail: The reason, or what was found.
    """

    what: str
    point: str
    verdict: Verdict
    error: float | None = None
    detail: str = ""


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest value: rounding of a few operations; a wrong point is off by the values themselves."""
    return max(2e-5, 8 * torch.finfo(dtype).eps)


def compare(
    what: str,
    point: str,
    got: Tensor,
    expected: Tensor,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
    slack: float = 0.0,
) -> Check:
    """Whether two values agree, where `keep` (over the leading dimensions) is true, to the rounding of `dtype`.

    `slack` is what larger values, of which these are differences, allow besides.
    """
    if got.shape != expected.shape:
        return Check(what, point, "fails", None, f"shapes {tuple(got.shape)} and {tuple(expected.shape)} differ")
    # Neighbours in a model may compute on several devices.
    expected = expected.to(got.device)
    if keep is not None and keep.shape == got.shape[: keep.ndim]:
        got, expected = got[keep.to(got.device)], expected[keep.to(got.device)]
    size = max(expected.abs().max().item(), 1e-12) if expected.numel() else 1.0
    error = (got.float() - expected.float()).abs().max().item() / size if got.numel() else 0.0
    allowed = tolerance(dtype or got.dtype) + slack / size
    return Check(what, point, "holds" if error <= allowed else "fails", error)
