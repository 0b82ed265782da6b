"""The survey of architectures: every status, told apart, and never an exception."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from torch import nn
from transformers import AutoConfig

from hooked_mm.survey import ARCHITECTURES, Status, Surveyed, check_miniature, markdown, summary, survey, survey_one
from hooked_mm.testing.miniatures import miniature


def test_the_architectures_are_those_of_transformers() -> None:
    """Each name is one that transformers makes a configuration of."""
    assert len(ARCHITECTURES) == len(set(ARCHITECTURES)) > 50
    assert {"llava", "idefics2", "qwen2_vl", "vision-encoder-decoder"} <= set(ARCHITECTURES)
    assert all(type(AutoConfig.for_model(family)) for family in ("llava", "mllama"))


def test_one_that_conforms() -> None:
    """Counts are those of the report, the error the largest of what holds."""
    model, report = check_miniature("llava")
    row = survey_one("llava")
    assert (row.status, row.note) == ("conforms", "early exit")
    assert (row.points, row.layers, row.vision_layers) == (len(model.hook_names), 4, 3)
    assert row.holds + row.fails + row.not_applicable == len(report.checks)
    assert 0 < row.error < 1e-4


def test_one_that_conforms_partly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not available is named without layers."""

    def bent(family: str) -> nn.Module:
        made: nn.Module = miniature(family)
        for block in made.get_submodule("model.language_model.layers").children():
            # The neurons are no longer what the activation makes of the gate, nor what the sum is made of.
            block.mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        return made

    monkeypatch.setattr("hooked_mm.survey.miniature", bent)
    row = survey_one("llava")
    assert row.status == "partly"
    assert row.fails > 0
    assert row.note == "early exit; not available: blocks.{l}.hook_mlp_out, blocks.{l}.mlp.hook_post"


@pytest.mark.parametrize(
    ("family", "status", "why"),
    [
        ("evolla", "not built", "it reads proteins"),
        ("fast_vlm", "not built", r"needs timm.*pip install timm"),
        ("never_heard_of", "not built", "no miniature of 'never_heard_of'"),
    ],
)
def test_one_that_is_not_there(family: str, status: str, why: str) -> None:
    """The reason, and what to install."""
    row = survey_one(family)
    assert row.status == status
    assert re.search(why, row.note)


def test_one_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose parts are not found is a row, not an exception."""
    monkeypatch.setattr("hooked_mm.survey.miniature", lambda family: nn.Linear(2, 2))
    row = next(survey(["a layer"]))
    assert row.status == "refused"
    assert "not a vision-language model" in row.note


def test_one_that_fails_in_a_way_that_nobody_thought_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and the others are surveyed all the same."""

    def broken(family: str) -> nn.Module:
        raise ZeroDivisionError("nobody thought of this\nor that")

    monkeypatch.setattr("hooked_mm.survey.miniature", broken)
    rows = list(survey(["a", "b"]))
    assert [row.status for row in rows] == ["refused"] * 2
    assert rows[0].note == "it fails with ZeroDivisionError: nobody thought of this"


def test_summary_and_page() -> None:
    """Counts by status; a table row per architecture that no character of a note breaks."""
    rows = [Surveyed("a", "conforms", "cross-attention", 3, 2, 1, 9), Surveyed("b", "refused", "x | y\nz")]
    assert summary(rows) == "2 architectures: 1 conforms, 0 partly, 1 refused, 0 not built"
    page = markdown(rows)
    assert summary(rows) in page
    assert all(f"*{status}*" in page for status in get_args(Status))
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {8}
    assert lines[2] == "| `a` | conforms | 3 | 2 | 1 | 9 | cross-attention |"
    assert "x / y z" in lines[3]
