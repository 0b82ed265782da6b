"""What readers of layouts share: which inputs are pictures, and where positions are adjacent."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.layout_source import in_row_zero, nothing, pictures, runs_of


def test_pictures_are_what_is_no_mask_and_no_place() -> None:
    """By any name; ids, masks, embeddings and boxes are none."""
    made = torch.zeros(2, 3)
    inputs = {
        **dict.fromkeys(("pixel_values", "flattened_patches", "image_patches"), made),
        **dict.fromkeys(("attention_mask", "pixel_attention_mask", "inputs_embeds", "bbox"), made),
        "input_ids": made.long(),
        "image_sizes": [(1, 2)],
    }
    assert list(pictures(inputs)) == ["pixel_values", "flattened_patches", "image_patches"]


@given(st.lists(st.booleans(), max_size=20))
def test_runs_cover_the_true_positions_and_touch_no_other(row: list[bool]) -> None:
    """As many as there are changes from false to true; none is empty, none touches the next."""
    runs = runs_of(torch.tensor(row, dtype=torch.bool))
    covered = [place for start, stop in runs for place in range(start, stop)]
    assert covered == [place for place, value in enumerate(row) if value]
    assert all(start < stop for start, stop in runs)
    assert all(one[1] < two[0] for one, two in pairwise(runs))


def test_cells_of_a_packed_tower_lie_in_its_only_row() -> None:
    """(row, place) of each cell; and no positions are none."""
    assert in_row_zero(torch.tensor([[4, 5]])).tolist() == [[[0, 4], [0, 5]]]
    assert nothing().tolist() == []
