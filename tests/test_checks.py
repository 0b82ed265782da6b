"""How exactly two values must agree, and where it is looked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.checks import compare, tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tolerance_is_a_few_roundings(dtype: torch.dtype) -> None:
    """One rounding of every element holds, an error of an eighth of the largest value does not."""
    exact = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert compare("", "", exact.to(dtype), exact, dtype=dtype).verdict == "holds"
    assert compare("", "", (exact + exact.abs().max() / 8).to(dtype), exact, dtype=dtype).verdict == "fails"
    assert tolerance(dtype) < 1 / 8


@given(st.floats(-6, 2))
def test_compare_measures_relative_to_the_largest_value(exponent: float) -> None:
    """Scaling both leaves the error as it is; it is the largest deviation over the largest value."""
    expected = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64) * 10**exponent
    got = expected + torch.tensor([0.0, 0.0, 0.4]) * 10**exponent
    check = compare("sum", "a point", got, expected)
    assert check.error == pytest.approx(0.1, rel=1e-5)
    assert (check.what, check.point, check.verdict) == ("sum", "a point", "fails")


def test_compare_looks_only_where_it_shall() -> None:
    """Padding does not count; shapes that differ are a failure and are named."""
    got, expected = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    got[0, 0], expected[1] = 7, 0
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[0, 0] = False
    assert compare("", "", got, expected).verdict == "fails"
    assert compare("", "", got, expected, keep).verdict == "holds"
    check = compare("", "", got, expected[:, :2])
    assert check.verdict == "fails"
    assert check.detail == "shapes (2, 3, 4) and (2, 2, 4) differ"


def test_differences_may_be_as_rough_as_what_they_are_differences_of() -> None:
    """What rounding leaves of large values is allowed where it is said, and nowhere else."""
    got, expected = torch.tensor([1.0, 0.001]), torch.tensor([1.001, 0.001])
    assert compare("", "", got, expected).verdict == "fails"
    assert compare("", "", got, expected, slack=0.002).verdict == "holds"
