"""A write that does nothing, or only half of what it says, is found at its point."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lies import Distorted, lying, report_of

NAMES = ("hook_embed", "blocks.0.ln1.hook_scale", "blocks.0.attn.hook_q", "blocks.0.attn.hook_pattern", "hook_logits")


def nothing(access: Any, run: Any, new: Any) -> None:
    """A write that is lost."""


@pytest.mark.parametrize("name", NAMES)
def test_a_lost_write_is_named_and_nothing_else(name: str) -> None:
    """In a block, of attention that is looked into, and outside."""
    report = report_of(lying("llava", distorted={name: lambda access: Distorted(access, put=nothing)}))
    assert list(report.failed_points()) == [name]


def test_a_write_of_half_the_change_is_named() -> None:
    """What is written is the mean of old and new: something follows, but not what was written."""

    def half(access: Any, run: Any, new: Any) -> None:
        access.write(run, (access.read(run) + new) / 2)

    name = "blocks.0.hook_attn_out"
    report = report_of(lying("llava", distorted={name: lambda access: Distorted(access, put=half)}))
    assert list(report.failed_points()) == [name]
