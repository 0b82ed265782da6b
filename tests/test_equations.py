"""The equations of a block, on values that were made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hooked_mm.checks import Check
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
