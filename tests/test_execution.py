"""When values pass, and which points are listed at another place than they pass."""

from __future__ import annotations

from itertools import combinations, pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.access import ModuleValue
from hooked_mm.batch import batch_from_inputs
from hooked_mm.execution import out_of_order, passing_times
from tests.lies import Distorted, equal_samples, lying


@given(st.lists(st.integers(0, 6), max_size=8))
def test_out_of_order_is_what_not_every_longest_part_keeps(times: list[int]) -> None:
    """Against all parts of the sequence, one by one."""
    for size in range(len(times), -1, -1):
        parts = [
            part
            for part in combinations(range(len(times)), size)
            if all(times[a] <= times[b] for a, b in pairwise(part))
        ]
        if parts:
            kept = set.intersection(*map(set, parts))
            assert out_of_order(times) == set(range(len(times))) - kept
            return


def test_an_honest_list_is_in_order() -> None:
    """Every point passes, each not before the one that it is listed behind; the model is left without hooks."""
    model = lying("qwen2_5_vl")
    batch = batch_from_inputs(equal_samples("qwen2_5_vl", 1), model.structure, model._config)
    with torch.no_grad():
        times = passing_times(model._runner, model.hook_points, batch)
    assert list(times) == model.hook_names
    assert not out_of_order([times[name] for name in model.hook_names])
    assert not any(module._forward_hooks for module in model.hf_model.modules())


def test_a_point_at_another_block_is_out_of_order() -> None:
    """And nothing else is."""
    place = "model.language_model.layers.2.mlp.down_proj"
    model = lying("llava", distorted={"blocks.0.mlp.hook_post": lambda a: Distorted(ModuleValue(place, "input"))})
    batch = batch_from_inputs(equal_samples("llava", 1), model.structure, model._config)
    with torch.no_grad():
        times = passing_times(model._runner, model.hook_points, batch)
    wrong = out_of_order([times[name] for name in model.hook_names])
    assert [model.hook_names[index] for index in wrong] == ["blocks.0.mlp.hook_post"]


def test_what_never_runs_has_no_time() -> None:
    """Without a picture the tower does not run."""
    model = lying("llava")
    inputs = {"input_ids": torch.tensor([[1, 5, 6]])}
    batch = batch_from_inputs(inputs, model.structure, model._config)
    with torch.no_grad():
        times = passing_times(model._runner, model.hook_points, batch)
    assert set(times) == {name for name, point in model.hook_points.items() if point.stream == "text"}
