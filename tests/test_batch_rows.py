"""A choice of a batch's samples against a batch prepared of these samples anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.layout import Layout
from tests.processors import FAMILIES, processor
from tests.tiny import picture, tiny

SMALL = ("llava", "idefics2", "qwen2_vl", "molmo")
PROMPTS = ["what colour is the circle ?", "describe the scene .", "what ?", "is there a star ?"]
ROWS = st.lists(st.integers(0, 3), min_size=1, max_size=5)
_MODELS: dict[str, HookedMM] = {}
# 0, 2 and 3 are the longest, highest and widest somewhere: with them among the rows, both batches are padded alike.
PICTURES = [[picture(40, 24, 1)], [picture(24, 24, 2)], [picture(20, 48, 3), picture(30, 30, 4)], [picture(48, 16, 5)]]


def small(name: str) -> HookedMM:
    """A shipped model, loaded once."""
    if f"small {name}" not in _MODELS:
        _MODELS[f"small {name}"] = HookedMM.small(name, check=False)
    return _MODELS[f"small {name}"]


def tiny_model(family: str) -> HookedMM:
    """A family's miniature with its processor."""
    if family not in _MODELS:
        _MODELS[family] = HookedMM(tiny(family), processor(family), check=False)
    return _MODELS[family]


def chosen(items: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    """What these rows have."""
    return [items[row] for row in rows]


def assert_same_layout(one: Layout, other: Layout) -> None:
    """Every field, grids included."""
    for name, value in vars(other).items():
        got = getattr(one, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(got, value), name
        elif name == "images":
            assert len(got) == len(value)
            for mine, theirs in zip(got, value, strict=True):
                for grid, expected in vars(theirs).items():
                    have = getattr(mine, grid)
                    assert (have is None) == (expected is None), grid
                    assert expected is None or torch.equal(have, expected), grid
        else:
            assert got == value, name


def logits_of(model: HookedMM, batch: Batch) -> list[torch.Tensor]:
    """Per sample, the logits at its own positions."""
    with torch.no_grad():
        logits = model.run_with_hooks(batch)
    assert logits is not None
    return [row[mask] for row, mask in zip(logits, batch.mask(), strict=True)]


@pytest.mark.parametrize("name", SMALL)
@given(rows=ROWS)
def test_logits_are_those_of_samples_prepared_anew(name: str, images: list[Image.Image], rows: list[int]) -> None:
    """Pictures of different sizes, several or none in a sample, prompts of different lengths."""
    model = small(name)
    sizes = [image.resize(size) for image, size in zip(images, ((48, 48), (72, 48), (48, 64), (56, 56)), strict=False)]
    pictures = [[sizes[0]], [sizes[1], sizes[2]], [], [sizes[3]]]
    batch = model.prepare(pictures, PROMPTS)
    anew = model.prepare(chosen(pictures, rows), chosen(PROMPTS, rows))
    taken = batch.take(rows)
    assert len(taken) == len(rows)
    for row, (got, expected) in enumerate(zip(logits_of(model, taken), logits_of(model, anew), strict=True)):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        for key in ("modality", "role"):
            real = [getattr(item, key)[row][item.mask()[row]].tolist() for item in (taken, anew)]
            assert real[0] == real[1]
        names = [
            [token for token, kept in zip(b.tokens[row], b.mask()[row], strict=True) if kept] for b in (taken, anew)
        ]
        assert names[0] == names[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [[2, 0, 3, 2], [0, 1, 2, 3], [3, 2, 0]])
def test_layout_and_inputs_are_those_of_samples_prepared_anew(family: str, rows: list[int]) -> None:
    """Every way in which families lay out pictures: crops, packed windows, tiles, overviews."""
    pictures, model = [list(own) for own in PICTURES], tiny_model(family)
    if family in ("florence2", "blip-2"):
        pictures = [own[:1] for own in pictures]
    texts = ["what is it?", "where", "and the colour of this one?", "how many"]
    taken = model.prepare(pictures, texts).take(rows)
    anew = model.prepare(chosen(pictures, rows), chosen(texts, rows))
    assert torch.equal(taken.input_ids, anew.input_ids)
    assert_same_layout(taken.layout, anew.layout)
    assert taken.inputs.keys() == anew.inputs.keys()
    with torch.no_grad():
        got, expected = (tiny(family)(**item.inputs).logits for item in (taken, anew))
    assert (got - expected)[anew.mask() if anew.decoder is None else ...].abs().max() <= 1e-5 * expected.abs().max()


def test_no_image_left_leaves_a_batch_of_text(images: list[Image.Image]) -> None:
    """No tower will run; `hook_embed` and what follows do."""
    for name in SMALL:
        batch = small(name).prepare([images[0], None, images[1]], PROMPTS[:3])
        taken = batch.take([1, 1])
        assert not taken.has_images
        assert taken.layout.kind == "none"
        anew = small(name).prepare(None, [PROMPTS[1]] * 2)
        for got, expected in zip(logits_of(small(name), taken), logits_of(small(name), anew), strict=True):
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_taken_batch_goes_on_as_any_other(llava: HookedMM, images: list[Image.Image]) -> None:
    """Taken again, generated from, extended by answers."""
    batch = llava.prepare(images[:3], PROMPTS[:3])
    again = batch.take([2, 0, 1]).take([1, 2])
    direct = batch.take([0, 1])
    assert_same_layout(again.layout, direct.layout)
    assert all(torch.equal(again.inputs[key], direct.inputs[key]) for key in direct.inputs)
    out = llava.generate(batch.take([1, 1, 0]), max_new_tokens=5)
    whole = llava.generate(batch, max_new_tokens=5)
    assert out.text == [whole.text[row] for row in (1, 1, 0)]
    assert out.batch is not None
    assert out.batch.take([2]).tokens[0] == out.batch.tokens[2]


def test_what_cannot_be_told_is_refused(llava: HookedMM, images: list[Image.Image]) -> None:
    """Samples that do not exist, and inputs of unknown meaning; those of one meaning alone are taken."""
    batch = llava.prepare([[images[0], images[1]], images[2]], PROMPTS[:2])
    for rows, named in (([], "no samples"), ([2], "sample 2 asked of a batch of 2"), ([0, -1], "sample -1")):
        with pytest.raises(BadInputError, match=named):
            batch.take(rows)
    for shape, named in (((5, 2), "'mark' of shape .* fits none"), ((), "fits none")):
        with pytest.raises(BadInputError, match=named):
            replace(batch, inputs={**batch.inputs, "mark": torch.zeros(shape)}).take([0])
    per_image = torch.arange(3)
    assert replace(batch, inputs={**batch.inputs, "mark": torch.arange(2)}).take([1]).inputs["mark"].tolist() == [1]
    assert replace(batch, inputs={**batch.inputs, "mark": per_image}).take([1, 0]).inputs["mark"].tolist() == [2, 0, 1]
    # As many images as samples, but otherwise shared out: a row may be of either.
    odd = llava.prepare([[images[0], images[1]], None], PROMPTS[:2])
    with pytest.raises(BadInputError, match=r"'mark' .* may be either"):
        replace(odd, inputs={**odd.inputs, "mark": torch.arange(2)}).take([1])
    with pytest.raises(BadInputError, match=r"'position_ids' .* a row per sample"):
        replace(batch, inputs={**batch.inputs, "position_ids": torch.zeros(3, 2, 9)}).take([0])
