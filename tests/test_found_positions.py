"""Image positions found by showing another picture."""

from __future__ import annotations

import pytest
import torch

from hooked_mm.batch import Modality
from hooked_mm.found_positions import Found, find_positions, other_pictures
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs


def test_widened_says_of_every_position_what_was_said_of_ids() -> None:
    """Ids lie between what the model puts before and behind them; the others get a number, or their own value."""
    found = Found(torch.tensor([[True, True, False, False, True]]), before=2, behind=1)
    assert found.widened(torch.tensor([[7, 8]]), -1).tolist() == [[-1, -1, 7, 8, -1]]
    assert found.widened(torch.tensor([[1, 0]]), found.image).tolist() == [[1, 1, 1, 0, 1]]


def test_other_pictures_keep_what_is_no_picture() -> None:
    """Empty tiles stay empty, patches keep row and column, rows of zeros stay; masks and boxes are no pictures."""
    tiles = torch.randn(2, 3, 3, 4, 4)
    tiles[1, 2] = 0
    patches = torch.cat([torch.ones(1, 4, 2), torch.randn(1, 4, 5)], dim=-1)
    patches[0, 3] = 0
    inputs = {"pixel_values": tiles, "flattened_patches": patches, "bbox": torch.rand(1, 2, 4), "pixel_mask": tiles}
    other = other_pictures(inputs)
    assert set(other) == {"pixel_values", "flattened_patches"}
    assert not other["pixel_values"][1, 2].any()
    assert bool((other["pixel_values"][0] != tiles[0]).all())
    assert torch.equal(other["flattened_patches"][..., :2], patches[..., :2])
    assert not other["flattened_patches"][0, 3].any()
    assert bool((other["flattened_patches"][0, :3, 2:] != patches[0, :3, 2:]).all())


def test_git_puts_its_image_in_front() -> None:
    """17 features (a class token and 4 x 4 patches) before all ids, padding included."""
    model = HookedMM(miniature("git"), check=False)
    inputs = miniature_inputs(model.hf_model)
    found = find_positions(model.hf_model, model.structure, inputs)
    assert found is not None
    assert (found.before, found.behind) == (17, 0)
    assert bool(found.image[:, :17].all())
    assert not found.image[:, 17:].any()
    batch = model._batch(inputs)
    assert batch.length == 17 + inputs["input_ids"].shape[1]
    assert torch.equal(batch.mask()[:, 17:], inputs["attention_mask"].bool())
    assert batch.layout.images[0].grid is not None
    # The class token stands before the grid.
    assert batch.layout.images[0].grid.tolist() == torch.arange(1, 17).view(4, 4).tolist()


def test_git_generates_behind_its_prefix() -> None:
    """Generated tokens are those of transformers, and a hook sees every one of them."""
    raw = miniature("git")
    model = HookedMM(raw, check=False)
    inputs = miniature_inputs(raw)
    seen: list[int] = []
    with model.hooks([("blocks.1.hook_resid_post", lambda value, hook: seen.append(value.shape[1]))]):
        out = model.generate(inputs, max_new_tokens=3)
    expected = raw.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.tokens.tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()
    assert seen == [17 + inputs["input_ids"].shape[1], 1, 1]


def test_udop_puts_patches_behind_and_adds_them_to_tokens() -> None:
    """16 patches less those under tokens' boxes stand behind the ids; a token with a box stays text."""
    model = HookedMM(miniature("udop"), check=False)
    inputs = miniature_inputs(model.hf_model)
    batch = model._batch(inputs)
    ids = inputs["input_ids"].shape[1]
    assert batch.modality.shape == (3, ids + 16)
    assert not (batch.modality[:, :ids] == int(Modality.IMAGE)).any()
    centre = (inputs["bbox"][..., :2] + inputs["bbox"][..., 2:]) / 2
    cells = (centre * 4).long().clamp(0, 3)
    # Tokens that stand nowhere take the first patch away, too.
    under = [len({tuple(cell) for cell in row.tolist()}) for row in cells]
    assert (batch.modality == int(Modality.IMAGE)).sum(dim=1).tolist() == [16 - count for count in under]


@pytest.mark.parametrize("family", ["llava", "kosmos-2", "blip", "pix2struct"])
def test_nothing_is_shown_twice_where_positions_are_known(family: str) -> None:
    """A token, a mask, or cross-attention say it."""
    model = HookedMM(miniature(family), check=False)
    assert find_positions(model.hf_model, model.structure, miniature_inputs(model.hf_model)) is None
