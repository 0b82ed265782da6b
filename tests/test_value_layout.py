"""What positions hold, against a plain loop over rows and positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.batch import Batch, Modality, Role
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.layout import Layout
from hooked_mm.runner import Hook
from hooked_mm.value_layout import has_heads, head_mask, layout, row_layout

IMAGE, TEXT = (int(Modality.IMAGE), int(Role.NONE)), (int(Modality.TEXT), int(Role.QUESTION))
KINDS = st.sampled_from([IMAGE, TEXT, (int(Modality.TEXT), int(Role.TEMPLATE)), (int(Modality.TEXT), int(Role.ANSWER))])


def of_images(owner: torch.Tensor, modality: torch.Tensor, grid: torch.Tensor | None = None) -> Layout:
    """Images of these samples, one row of the tower each, or packed in grids (frames, rows, cols)."""
    index = torch.where(modality == Modality.IMAGE, 0, -1)
    shown = torch.arange(len(owner))
    if grid is not None:
        shown = shown.repeat_interleave(grid.prod(dim=1))
    kind: Any = "crops" if grid is None else "packed"
    return Layout(kind, owner.long(), index, torch.zeros_like(index).bool(), tower_image=shown)


def make_batch(samples: list[list[tuple[int, int]]], left: bool = True, **inputs: torch.Tensor) -> Batch:
    """A batch of samples given as (modality, role) per token, padded with (PAD, NONE)."""
    width = max(map(len, samples))
    rows = []
    for tokens in samples:
        pad = [(int(Modality.PAD), int(Role.NONE))] * (width - len(tokens))
        rows.append(pad + tokens if left else tokens + pad)
    modality, role = torch.tensor(rows, dtype=torch.int8).unbind(-1)
    owner = torch.tensor([row for row, tokens in enumerate(samples) if IMAGE in tokens])
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    return Batch(
        {"input_ids": ids, **inputs}, modality, role, of_images(owner, modality, inputs.get("image_grid_thw")), []
    )


@given(
    samples=st.lists(st.lists(KINDS, min_size=1, max_size=6), min_size=1, max_size=3),
    left=st.booleans(),
    step=st.integers(0, 4),
    beams=st.integers(1, 3),
    data=st.data(),
)
def test_tokens_against_a_loop(
    samples: list[list[tuple[int, int]]], left: bool, step: int, beams: int, data: st.DataObject
) -> None:
    """Any number of last positions, at any step, with beams: what each holds is what a loop finds."""
    batch = make_batch(samples, left)
    width = batch.modality.shape[1]
    count = data.draw(st.integers(1, width + step))
    plan = layout(Hook("blocks.0.hook_resid_post", 0, step, batch), (beams * len(samples), count, 8))
    assert plan.has_given == (count > step)
    for row in range(beams * len(samples)):
        tokens = samples[row // beams]
        offset = width - len(tokens) if left else 0
        prompt = [index for index, token in enumerate(tokens) if token[1] != int(Role.ANSWER)]
        for column in range(count):
            place = width + step - count + column
            own = len(tokens) + place - width if place >= width else place - offset
            real = place >= width or 0 <= own < len(tokens)
            token = (int(Modality.TEXT), int(Role.ANSWER)) if place >= width else tokens[own] if real else (0, 0)
            expected = {
                "modality": token[0],
                "role": token[1],
                "own": own if real else -1,
                "length": len(tokens),
                "last_prompt": place < width and real and bool(prompt) and own == prompt[-1],
                "generated": place >= width,
                "unit": row,
                "image": 0,
                "sample": row // beams,
            }
            for name, value in expected.items():
                assert plan.need(name, "the test").expand(plan.shape)[row, column] == value, name


def test_the_real_shapes_of_a_run_fit(llava: HookedMM, images: list[Image.Image]) -> None:
    """Every point of a pass has a layout; towers say whose image a row is."""
    batch = llava.prepare([[images[0], images[1]], [], [images[2]]], ["what place is this ?", "what", "describe ."])
    _, cache = llava.run_with_cache(batch)
    for name, value in cache.items():
        plan = layout(Hook(name, None, 0, batch), value.shape)
        assert plan.shape == tuple(value.shape[:2])
        assert has_heads(name) == (value.ndim == 4)
        tower = name.startswith(("vision.", "projector."))
        assert plan.need("sample", "the test").flatten().tolist() == ([0, 0, 2] if tower else [0, 1, 2])
        assert plan.need("image", "the test").flatten().tolist() == ([0, 1, 0] if tower else [0])


def test_a_packed_tower_is_split_by_its_grid() -> None:
    """Two images of one sample and one of another, of 4, 6 and 8 patches; merged by two behind the projector."""
    samples = [[IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, TEXT], [IMAGE, IMAGE, IMAGE, IMAGE, TEXT]]
    grids = torch.tensor([[1, 2, 2], [1, 2, 3], [2, 2, 2]])
    batch = make_batch(samples)
    batch = replace(batch, layout=of_images(torch.tensor([0, 0, 1]), batch.modality, grids))
    tower = layout(Hook("vision.blocks.0.hook_resid_post", 0, 0, batch), (18, 32))
    own = [*range(4), *range(6), *range(8)]
    assert tower.need("own", "").flatten().tolist() == own
    assert tower.need("length", "").flatten().tolist() == [4] * 4 + [6] * 6 + [8] * 8
    assert tower.need("sample", "").flatten().tolist() == [0] * 10 + [1] * 8
    merged = layout(Hook("projector.hook_out", None, 0, batch), (9, 32))
    assert merged.need("own", "").flatten().tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    heads = layout(Hook("vision.blocks.0.attn.hook_q", 0, 0, batch), (18, 2, 16))
    assert heads.shape == (1, 18)
    # Two beams: all images of the first sample twice, then those of the second.
    beams = layout(Hook("vision.blocks.0.hook_resid_post", 0, 0, batch), (36, 32))
    assert beams.need("own", "").flatten().tolist() == [*own[:10], *own[:10], *own[10:], *own[10:]]
    assert beams.need("sample", "").flatten().tolist() == [0] * 20 + [1] * 16
    assert beams.need("image", "").flatten().tolist() == ([0] * 4 + [1] * 6) * 2 + [0] * 16
    assert beams.need("unit", "").unique().tolist() == list(range(6))
    lost = layout(Hook("vision.blocks.0.hook_resid_post", 0, 0, batch), (19, 32))
    with pytest.raises(BadInputError, match=r"vector per sample was asked for .* can't be traced to single images"):
        lost.pick(torch.zeros(2, 32), "vector")


def test_more_rows_than_the_tower_has_are_beams() -> None:
    """Three times its rows are three beams, row by row as `pixel_values` (images, c, h, w); other numbers are none."""
    batch = make_batch([[IMAGE, TEXT], [IMAGE, TEXT]], pixel_values=torch.zeros(2, 3, 4, 4))
    plan = row_layout(Hook("projector.hook_out", None, 0, batch), 6, 5)
    assert plan.need("sample", "")[:, 0].tolist() == [0] * 3 + [1] * 3
    assert plan.need("unit", "")[:, 0].tolist() == list(range(6))
    with pytest.raises(BadInputError, match="can't be traced"):
        row_layout(Hook("projector.hook_out", None, 0, batch), 5, 5).need("sample", "vector per sample")
    with pytest.raises(BadInputError, match=r"\(2, 3, 5\) places is none of this batch's tower"):
        layout(Hook("projector.hook_out", None, 0, batch), (2, 3, 5, 8))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blocks.0.hook_resid_post", (3, 2, 8), r"3 rows, which is no multiple of the batch's 2 samples"),
        ("blocks.0.hook_resid_post", (2, 4, 8), r"4 positions at step 1, but the batch has 2 and 1"),
        ("blocks.0.attn.hook_pattern", (2, 4, 2, 2), r"not laid out by positions.*use KnockOut"),
        ("blocks.0.xattn.hook_k", (2, 3, 4, 8), r"3 positions at step 0, but the batch has 2"),
    ],
)
def test_shapes_that_can_not_be_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    """With the point, the numbers and the likely reason."""
    batch = make_batch([[TEXT, TEXT], [TEXT]])
    with pytest.raises(BadInputError, match=message):
        layout(Hook(name, 0, 1, batch), shape)


def test_heads() -> None:
    """One, several, from the end, all; one that does not exist is refused."""
    assert head_mask(-1, 3, "x", torch.device("cpu")).tolist() == [False, False, True]
    assert head_mask([0, 2], 3, "x", torch.device("cpu")).tolist() == [True, False, True]
    assert head_mask(None, 2, "x", torch.device("cpu")).all()
    with pytest.raises(BadInputError, match=r"head 3 was asked for, but 'x' has 3 heads"):
        head_mask((1, 3), 3, "x", torch.device("cpu"))
