"""A sample's activations do not depend on its companions, on their order, or on the side of its padding."""

from __future__ import annotations

from functools import cache as memoise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, recipe
from hooked_mm.testing.recipe import IMAGE_TOKEN
from tests.families import close

FAMILIES = ("llava", "qwen2_vl", "idefics3", "gemma3")
NAMES = ["blocks.*.hook_resid_*", "blocks.*.attn.hook_z", "blocks.*.mlp.hook_post", "ln_final.*", "hook_logits"]


@memoise
def hooked(family: str) -> HookedMM:
    """A miniature, built once."""
    return HookedMM(miniature(family), check=False)


@memoise
def pictures(family: str) -> tuple[dict[str, Tensor], list[int]]:
    """Six random pictures, of several sizes where the family has any, and how many positions each takes."""
    model = hooked(family).hf_model
    made = recipe(model.config.model_type)
    vision = made.pictures(model.config, 6, torch.Generator().manual_seed(5))
    return vision, made.counts(model, vision)


def vision_part(family: str, samples: list[int | None]) -> dict[str, Tensor]:
    """The tensors of the samples' pictures, in this order."""
    vision, _ = pictures(family)
    numbers = [number for number in samples if number is not None]
    if not numbers:
        return {}
    if family == "idefics3":
        # One row per sample; where there is no picture, zeros.
        found = {name: value[[number or 0 for number in samples]].clone() for name, value in vision.items()}
        for row, number in enumerate(samples):
            if number is None:
                found["pixel_values"][row], found["pixel_attention_mask"][row] = 0, 0
        return found
    if "image_grid_thw" not in vision:
        return {name: value[numbers] for name, value in vision.items()}
    sizes = vision["image_grid_thw"].prod(dim=1).tolist()
    parts = vision["pixel_values"].split(sizes)
    return {
        "pixel_values": torch.cat([parts[number] for number in numbers]),
        "image_grid_thw": vision["image_grid_thw"][numbers],
    }


def inputs_of(family: str, samples: list[tuple[int | None, list[int]]], side: str) -> tuple[dict[str, Tensor], Any]:
    """Forward tensors of samples (picture or None, words), and where each has its own positions."""
    counts = pictures(family)[1]
    rows = [[1, *words[:2], *[IMAGE_TOKEN] * (0 if n is None else counts[n]), *words[2:]] for n, words in samples]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    marks = {"qwen2_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family not in ("qwen2_vl",):
        # Their forward counts positions from the first column, padding or not.
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    if family in marks:
        inputs[marks[family]] = (ids == IMAGE_TOKEN).long()
    return {**inputs, **vision_part(family, [n for n, _ in samples])}, mask.bool()


sample = st.tuples(st.integers(0, 5), st.lists(st.integers(3, 140), min_size=3, max_size=9))
text_only = st.tuples(st.none(), st.lists(st.integers(3, 140), min_size=3, max_size=9))


@pytest.mark.parametrize("family", FAMILIES)
@given(
    first=sample,
    others=st.lists(st.one_of(sample, sample, text_only), min_size=1, max_size=3),
    place=st.integers(0, 3),
    side=st.sampled_from(["left", "right"]),
    mine=st.booleans(),
)
def test_a_sample_is_the_same_in_any_company(
    family: str,
    first: tuple[int | None, list[int]],
    others: list[tuple[int | None, list[int]]],
    place: int,
    side: str,
    mine: bool,
) -> None:
    """Alone, or anywhere among others with other pictures, with none, padded on either side: within 1e-5 at its own
    positions; with a text-only sample in question too."""
    model = hooked(family)
    own = first if mine else (None, first[1])
    place = min(place, len(others))
    alone, _ = inputs_of(family, [own], side)
    together, mask = inputs_of(family, [*others[:place], own, *others[place:]], side)
    _, single = model.run_with_cache(alone, NAMES)
    _, company = model.run_with_cache(together, NAMES)
    for name, value in single.items():
        got = company[name][place][mask[place]]
        assert close(got, value[0]) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
@given(samples=st.permutations([0, 1, 2, 3, 4, 5]).map(lambda numbers: numbers[:3]))
def test_a_picture_is_the_same_in_any_company(family: str, samples: list[int]) -> None:
    """Tower and projector see each picture alone: its patches are the same in every batch, patterns included."""
    model = hooked(family)
    names = ["vision.blocks.*.hook_resid_post", "projector.*", "vision.blocks.1.attn.hook_pattern"]
    together, _ = inputs_of(family, [(number, [5, 6, 7]) for number in samples], "left")
    _, company = model.run_with_cache(together, names)
    start = dict.fromkeys(company, 0)
    for row, number in enumerate(samples):
        alone, _ = inputs_of(family, [(number, [5, 6, 7])], "left")
        _, single = model.run_with_cache(alone, names)
        for name, value in single.items():
            if value.ndim == 2:
                got = company[name][start[name] : start[name] + len(value)]
                start[name] += len(value)
            elif name.endswith("hook_pattern") and value.shape[0] == 1 and company[name].shape[0] == 1:
                end = start[name] + value.shape[2]
                got, inside = company[name][..., start[name] : end, :], slice(start[name], end)
                assert not got[..., : start[name]].any()
                assert not got[..., end:].any()
                got, start[name] = got[..., inside], end
            else:
                got = company[name][row : row + 1]
            assert close(got, value) < 1e-5, (name, number)
