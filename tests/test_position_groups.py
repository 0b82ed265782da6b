"""Groups of positions: every position is in one, an object's patches are those that its pixels lie in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from analyses.position_groups import (
    Masked,
    coverage,
    latent_shares,
    object_positions,
    patch_positions,
    position_groups,
    subject_positions,
)
from hooked_mm.batch import Modality
from hooked_mm.connector import Connector
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.positions import ALL
from hooked_mm.runner import Hook
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.world import Scene

QUESTIONS = ("what colour is the star ?", "is there a big star above the small red circle ?", "what place is this ?")


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(*[st.integers(-8, 8)] * 4),
    st.integers(0, 2**31),
)
def test_coverage_is_the_mean_over_finely_cut_pixels(
    size: tuple[int, int], grid: tuple[int, int], edges: tuple[int, ...], seed: int
) -> None:
    """A box on quarters of pixels, cells of so many quarters: what lies outside of the picture counts as nothing."""
    mask = torch.from_numpy(np.random.default_rng(seed).random(size))
    rows, cols = grid
    top, left = edges[0], edges[1]
    high, wide = 1 + abs(edges[2]), 1 + abs(edges[3])
    fine = torch.zeros(200, 200, dtype=torch.float64)
    large = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    fine[40 : 40 + 4 * size[0], 40 : 40 + 4 * size[1]] = large
    cut = fine[40 + top : 40 + top + rows * high, 40 + left : 40 + left + cols * wide]
    expected = cut.reshape(rows, high, cols, wide).mean((1, 3))
    box = (left / 4, top / 4, (left + cols * wide) / 4, (top + rows * high) / 4)
    torch.testing.assert_close(coverage(mask, box, grid), expected, rtol=0, atol=1e-12)


def masks_of(items: list[Scene]) -> list[torch.Tensor]:
    """Of each scene's first object."""
    return [torch.from_numpy(render(item)[1][0] > 0) for item in items]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_objects_patches_are_those_its_pixels_lie_in(
    llava: HookedMM, scenes: list[Scene], images: list[Image.Image], side: str
) -> None:
    """By a picture padded to a square by hand and cut into 8 x 8, whatever the text's padding and the companions."""
    masks = masks_of(scenes[:3])
    batch = llava.prepare(images[:3], list(QUESTIONS), padding_side=side)
    found = object_positions(llava, batch, images[:3], masks, 0.25)
    for sample, (image, mask) in enumerate(zip(images[:3], masks, strict=True)):
        size = max(image.size)
        square = torch.zeros(size, size, dtype=torch.float64)
        top, left = (size - image.height) // 2, (size - image.width) // 2
        square[top : top + image.height, left : left + image.width] = mask.double()
        cells = torch.nn.functional.adaptive_avg_pool2d(square[None, None], 8)[0, 0]
        expected = cells.flatten() > 0.25
        assert 0 < int(expected.sum()) < 64
        own = found[sample][batch.modality[sample] == Modality.IMAGE]
        # Where a cell's edge cuts through pixels, the pool of whole pixels is another share.
        sure = (cells.flatten() - 0.25).abs() > (1e-6 if size % 8 == 0 else 0.15)
        assert torch.equal(own[sure], expected[sure])
        alone = llava.prepare([image], [QUESTIONS[sample]])
        mine = object_positions(llava, alone, [image], [mask], 0.25)[0]
        assert torch.equal(mine[alone.modality[0] == Modality.IMAGE], own)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_position_up_to_the_last_is_in_one_group(
    llava: HookedMM, scenes: list[Scene], images: list[Image.Image], side: str
) -> None:
    """With answers and without; nothing of padding or of what comes after."""
    subjects = ["star", "small red circle", None]
    for answers in (None, ["red", "yes", "beach"]):
        batch = llava.prepare(images[:3], list(QUESTIONS), answers, padding_side=side)
        objects = object_positions(llava, batch, images[:3], masks_of(scenes[:3]))
        named = subject_positions(batch, llava.tokenizer, subjects)
        groups = position_groups(batch, objects=objects, subjects=named)
        assert list(groups) == ["object", "other patches", "subject", "question", "template", "last"]
        together = torch.stack(list(groups.values())).sum(0)
        upto = torch.arange(batch.modality.shape[1]) <= batch.last_prompt()[:, None]
        assert torch.equal(together, ((batch.modality != Modality.PAD) & upto).long())
        said = [[batch.tokens[n][p] for p in groups["subject"][n].nonzero()[:, 0]] for n in range(3)]
        assert said == [["star"], ["small", "red", "circle"], []]
        assert [batch.tokens[n][int(groups["last"][n].nonzero())] for n in range(3)] == [":"] * 3


def test_without_masks_the_image_is_one_group_and_answers_before_the_row_are_their_own(
    llava: HookedMM, images: list[Image.Image]
) -> None:
    """The row that predicts the second token of an answer."""
    batch = llava.prepare(images[:1], "where is the star ?", ["top left"])
    row = batch.last_prompt() + 1
    groups = position_groups(batch, row)
    assert list(groups) == ["image", "question", "template", "last"]
    groups = position_groups(batch, row + 1)
    assert [batch.tokens[0][p] for p in groups["answer"][0].nonzero()[:, 0]] == ["top"]
    assert int(groups["image"].sum()) == 64


def test_a_mask_as_a_rule_means_the_same_under_padding_and_in_a_generation(
    llava: HookedMM, images: list[Image.Image]
) -> None:
    """Tokens that are generated are none of it."""
    for side in ("left", "right"):
        batch = llava.prepare(images[:2], list(QUESTIONS[:2]), padding_side=side)
        mask = batch.role == 2
        rule = Masked.of_positions(batch, mask)
        hook = Hook("blocks.0.hook_resid_post", 0, 0, batch)
        assert torch.equal(rule.resolve(hook, (2, *mask.shape[1:], 128)), mask)
        assert torch.equal((ALL & rule).resolve(hook, (2, *mask.shape[1:], 128)), mask)
    later = Hook("blocks.0.hook_resid_post", 0, 3, llava.prepare(images[:2], list(QUESTIONS[:2])))
    assert not rule.resolve(later, (2, 1, 128)).any()
    with pytest.raises(BadInputError, match="a mask over tokens was used at 'vision"):
        rule.resolve(Hook("vision.blocks.0.hook_resid_post", 0, 0, batch), (2, 65, 96))
    with pytest.raises(BadInputError, match="for positions of"):
        Masked.of_positions(batch, mask[:, 1:])


def test_the_towers_patches_of_an_object_are_those_of_the_sequence(
    llava: HookedMM, scenes: list[Scene], images: list[Image.Image]
) -> None:
    """LLaVA's image positions are its tower's patches in order, the class token left out."""
    masks = masks_of(scenes[:2])
    batch = llava.prepare(images[:2], QUESTIONS[0])
    _, cache = llava.run_with_cache(batch, "vision.blocks.1.hook_resid_post")
    value = cache["vision.blocks.1.hook_resid_post"]
    found = patch_positions(llava, batch, images[:2], masks, value.shape)
    lead = value.shape[1] - 64
    expected = object_positions(llava, batch, images[:2], masks)[batch.modality == Modality.IMAGE].reshape(2, 64)
    assert torch.equal(found[:, lead:], expected)
    rule = Masked.of_patches(batch, found)
    assert torch.equal(rule.resolve(Hook("vision.blocks.1.hook_resid_post", 1, 0, batch), value.shape), found)


@pytest.mark.usefixtures("unchecked")
def test_a_resamplers_latents_are_refused_or_dealt_out_by_what_they_take(
    scenes: list[Scene], images: list[Image.Image]
) -> None:
    """The k-th latent takes from the k-th patch alone here: the latents of the object's patches are the object's."""
    model, masks = HookedMM.small("idefics2"), masks_of(scenes[:2])
    batch = model.prepare(images[:2], QUESTIONS[0])
    with pytest.raises(BadInputError, match="sample 0: the positions of its image belong to no place"):
        object_positions(model, batch, images[:2], masks)
    _, cache = model.run_with_cache(batch, "vision.blocks.0.hook_resid_post")
    shape = cache["vision.blocks.0.hook_resid_post"].shape
    patches = patch_positions(model, batch, images[:2], masks, shape, 0.5)
    sample, position = batch.mask("image").nonzero(as_tuple=True)
    count = len(sample) // 2
    patch = torch.arange(count).repeat(2)
    weight = torch.ones(len(sample))
    found = object_positions(
        model, batch, images[:2], masks, 0.5, Connector(sample, position, sample, patch, weight, batch)
    )
    assert torch.equal(found[sample, position], patches[sample, patch])
    assert 0 < int(found.sum()) < len(sample)
    half = Connector(
        *(torch.cat([one, one]) for one in (sample, position, sample)),
        torch.cat([patch, patch.flip(0)]),
        torch.cat([weight, weight]) / 2,
        batch,
    )
    mixed = latent_shares(model, half, dict(enumerate(zip(images[:2], masks, strict=True))))
    alone = latent_shares(
        model,
        Connector(sample, position, sample, patch, weight, batch),
        dict(enumerate(zip(images[:2], masks, strict=True))),
    )
    torch.testing.assert_close(mixed.sum(1), alone.sum(1), rtol=0, atol=1e-9)


def test_what_does_not_correspond_is_refused(llava: HookedMM, images: list[Image.Image]) -> None:
    """With the value, the reason and the remedy."""
    batch = llava.prepare(images[:2], QUESTIONS[0])
    mask = torch.ones(images[0].height, images[0].width, dtype=torch.bool)
    with pytest.raises(BadInputError, match="2 pictures and 1 masks for a batch of 2 images"):
        object_positions(llava, batch, images[:2], [mask])
    with pytest.raises(BadInputError, match=f"image 0 has {images[0].width} x"):
        object_positions(llava, batch, images[:2], [mask[:-1], None])
    with pytest.raises(BadInputError, match="no extent"):
        coverage(mask, (0, 0, 0, 5), (2, 2))
    with pytest.raises(BadInputError, match="sample 1: the question does not say 'ring'"):
        subject_positions(batch, llava.tokenizer, [None, "ring"])
    with pytest.raises(BadInputError, match="1 subjects for 2 samples"):
        subject_positions(batch, llava.tokenizer, [None])
    with pytest.raises(BadInputError, match="rows of shape"):
        position_groups(batch, batch.last_prompt()[:1])
    with pytest.raises(BadInputError, match="roles are unknown"):
        position_groups(llava._batch(batch.inputs))


@pytest.mark.usefixtures("unchecked")
def test_overviews_hold_the_object_too(scenes: list[Scene], images: list[Image.Image]) -> None:
    """Molmo sees crops and the whole beside them: an object has patches in both, by cells counted by hand."""
    number = next(place for place, image in enumerate(images) if image.size == (56, 56))
    model, (mask,) = HookedMM.small("molmo"), masks_of(scenes[number : number + 1])
    batch = model.prepare([images[number]], QUESTIONS[0])
    found = object_positions(model, batch, [images[number]], [mask], 0.3)[0]
    own = batch.layout.images[0]
    for grid, fine in ((own.grid, 5), (own.overview, 3)):
        assert grid is not None
        assert grid.shape[0] == grid.shape[1]
        large = mask.double().repeat_interleave(fine, 0).repeat_interleave(fine, 1)
        side = 56 * fine // grid.shape[0]
        expected = large.reshape(grid.shape[0], side, grid.shape[1], side).mean((1, 3)) > 0.3
        assert torch.equal(found[grid], expected)
        assert expected.any()
