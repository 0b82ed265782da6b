"""The order of windows: by hand, and against what the installed transformers does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from hooked_mm.windows import window_order

pytestmark = pytest.mark.oldest


def _of_transformers(sizes: Tensor, merge: int, window: int, patch: int) -> Tensor:
    """A function of its own in newer versions, in older ones a method of the tower."""
    if hasattr(modeling_qwen2_5_vl, "get_vision_window_index"):
        order, _ = modeling_qwen2_5_vl.get_vision_window_index(sizes, merge, window, patch)
        return order
    tower = SimpleNamespace(window_size=window, spatial_merge_size=merge, patch_size=patch, spatial_merge_unit=merge**2)
    order, _ = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel.get_window_index(tower, sizes)
    return order


def test_by_hand() -> None:
    """Two frames of 2 x 3 merged patches in windows of 2 x 2, then a picture of one."""
    order = window_order(torch.tensor([[2, 4, 6], [1, 2, 2]]), merge=2, side=2)
    assert order.tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 9, 10, 8, 11, 12]
    assert window_order(torch.zeros(0, 3, dtype=torch.long), merge=2, side=2).tolist() == []


@given(
    sizes=st.lists(st.tuples(*[st.integers(1, high) for high in (3, 7, 7)]), min_size=1, max_size=3),
    merge=st.integers(1, 3),
    side=st.integers(1, 4),
    patch=st.integers(1, 3),
)
def test_as_transformers(sizes: list[tuple[int, int, int]], merge: int, side: int, patch: int) -> None:
    """Any pictures, merges and windows."""
    grid = torch.tensor([[frames, rows * merge, cols * merge] for frames, rows, cols in sizes])
    assert torch.equal(window_order(grid, merge, side), _of_transformers(grid, merge, side * merge * patch, patch))
