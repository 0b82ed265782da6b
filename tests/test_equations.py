"""The equations of a block, on values that were made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_mm.checks import Check, compare, tolerance
from hooked_mm.equations import BlockEquations
from tests.lies import built, equal_samples, honest, lying


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    """Everything in the first block of the miniature LLaVA's text."""
    model = lying("llava")
    with torch.no_grad():
        _, cache = model.run_with_cache(equal_samples("llava", 2), "blocks.0.*")
    return dict(cache)


def checks(values: dict[str, Tensor]) -> list[Check]:
    """All equations of that block."""
    block = honest("llava").text.blocks[0]
    return list(BlockEquations(values, built("llava"), block, "blocks.0.", None).all())


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


def test_every_equation_of_an_honest_block_holds(values: dict[str, Tensor]) -> None:
    """From the stream to the neurons: sums, norms, projections, attention, MLP."""
    found = checks(values)
    assert all(check.verdict == "holds" for check in found)
    assert {check.what for check in found} == {
        "resid_pre + attention == resid_mid",
        "resid_mid + MLP == resid_post",
        "the stream's divisor",
        "stream / divisor",
        "quotient * gain",
        "projection of the norm's output",
        "rows of attention sum to 1",
        "pattern * values == z",
        "z through the output projection == result",
        "rotation keeps the length of queries",
        "rotation keeps the length of keys",
        "softmax of queries * keys == pattern",
        "sum of heads + bias == what is added",
        "act(pre) == post",
        "down projection of post == what the MLP adds",
    }


NAMES = [
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"),
    *(f"{norm}.hook_{part}" for norm in ("ln1", "ln2") for part in ("scale", "normalized", "out")),
    *(f"attn.hook_{part}" for part in ("q", "k", "v", "rot_q", "rot_k", "pattern", "z", "result")),
    *(f"mlp.hook_{part}" for part in ("pre", "pre_linear", "post")),
]


@pytest.mark.parametrize("name", NAMES)
def test_no_value_can_be_another(values: dict[str, Tensor], name: str) -> None:
    """Whatever value is turned round, an equation fails, and the point is among those that are named.

    The stream before the block is the end of another block and is judged there; here what stands on it is named.
    """
    lie = {**values, f"blocks.0.{name}": values[f"blocks.0.{name}"].flip(1)}
    named = {check.point for check in checks(lie) if check.verdict == "fails"}
    owner = {"hook_resid_pre": "ln1.hook_scale", "attn.hook_pattern": "attn.hook_z"}.get(name, name)
    assert f"blocks.0.{owner}" in named


def test_shapes_that_fit_no_equation_are_a_failure(values: dict[str, Tensor]) -> None:
    """Heads that can't be multiplied do not end the check."""
    wrong = values["blocks.0.attn.hook_v"].unflatten(-1, (4, 4)).flatten(2, 3)
    failed = [check for check in checks({**values, "blocks.0.attn.hook_v": wrong}) if check.verdict == "fails"]
    assert "blocks.0.attn.hook_z" in {check.point for check in failed}


def test_a_block_without_sums_says_why(values: dict[str, Tensor]) -> None:
    """Where norms stand behind the sums, no sum of points is the stream: not applicable, with the reason."""
    block = replace(honest("llava").text.blocks[0], wiring="post")
    found = list(BlockEquations(values, built("llava"), block, "blocks.0.", None).sums())
    assert [check.verdict for check in found] == ["not applicable"] * 2
    assert all("normalises after the sum" in check.detail for check in found)
