"""Modules that run several times in a pass are refused by the name of the point, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hooked_mm.errors import BadInputError
from hooked_mm.repeats import run_once


def runs(module: nn.Module, times: int, error: Exception | None = None) -> None:
    """A module so many times, and then an error."""
    with run_once([("vision.hook_embed", module)]):
        for _ in range(times):
            module(torch.ones(1, 2))
        if error is not None:
            raise error


def test_a_second_run_is_refused_at_the_end() -> None:
    module = nn.Linear(2, 2)
    runs(module, 1)
    with pytest.raises(BadInputError, match=r"'vision.hook_embed' lies in a module that runs 3 times on this batch"):
        runs(module, 3)
    assert not module._forward_pre_hooks


def test_runs_on_numbers_of_words_do_not_count() -> None:
    """Ovis's table is asked for the image's features, then for the marks of an image by their numbers."""
    table = nn.Embedding(3, 2)
    with run_once([("projector.hook_out", table)]):
        table(torch.tensor([0]))
        table(torch.tensor([1]))


def test_an_error_inside_is_the_one_that_counts() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError):
        runs(module, 2, ZeroDivisionError())
    assert not module._forward_pre_hooks
