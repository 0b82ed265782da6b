"""Sets of image tokens: regions against masks pooled by hand, registers by norm, controls of the same size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from analyses.segment_command import object_masks
from analyses.token_ablation import token_features
from analyses.token_sets import (
    first_of,
    largest_norm,
    random_orders,
    random_regions,
    random_tokens,
    region_tokens,
    token_grids,
)
from hooked_mm.connector import connector_map
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.world import Scene


def mask_of(scene: Scene) -> Tensor:
    """The first object's pixels."""
    first = scene.objects[0]
    masks = object_masks(scene, "shape")
    return masks[first.shape]


def test_a_region_is_what_lies_under_the_mask(llava: HookedMM, scenes: list[Scene], images: list[Image.Image]) -> None:
    """The small LLaVA pads pictures to squares of 8 x 8 patches: masks padded and averaged by hand."""
    batch = llava.prepare(images[:4], "what")
    tokens, _ = token_features(llava, batch)
    masks = [mask_of(scene) for scene in scenes[:4]]
    for share in (0.5, 0.1):
        found = region_tokens(llava, batch, tokens, [[mask] for mask in masks], share)
        for sample, mask in enumerate(masks):
            side = max(mask.shape)
            top, left = (side - mask.shape[0]) // 2, (side - mask.shape[1]) // 2
            # Each pixel many times, so that patches have whole numbers of them.
            square, known = np.zeros((2, side, side))
            square[top : top + mask.shape[0], left : left + mask.shape[1]] = mask.numpy()
            known[top : top + mask.shape[0], left : left + mask.shape[1]] = 1
            of, all_ = (
                torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(part)[None], 8)[0] for part in (square, known)
            )
            pooled = (of / all_.clamp_min(1e-9)).flatten()
            clear = (pooled - min(share, float(pooled.max()))).abs() > 0.1
            expected = pooled >= min(share, float(pooled.max()))
            assert torch.equal(found[sample][clear], expected[clear])
            assert found[sample].any()


def test_a_small_object_has_the_patch_it_covers_most(llava: HookedMM, images: list[Image.Image]) -> None:
    """No patch reaches the share; an empty mask has no token."""
    batch = llava.prepare([images[0]] * 2, "what")
    tokens, _ = token_features(llava, batch)
    speck = torch.zeros(images[0].height, images[0].width, dtype=torch.bool)
    speck[1:3, 1:3] = True
    found = region_tokens(llava, batch, tokens, [[speck], [torch.zeros_like(speck)]])
    assert found.sum(1).tolist() == [1, 0]


def test_crops_and_overview_both_show_an_object(images: list[Image.Image], scenes: list[Scene]) -> None:
    """The small Molmo sees a picture twice."""
    model = HookedMM.small("molmo", check=False)
    batch = model.prepare(images[:2], "what")
    tokens, _ = token_features(model, batch)
    masks = [[mask_of(scene)] for scene in scenes[:2]]
    found = region_tokens(model, batch, tokens, masks)
    for sample in range(2):
        (grids,) = token_grids(model, batch, tokens, sample, [images[sample].size])
        assert len(grids) == 2
        numbers = [grid[~grid.isnan()].long() for grid, _ in grids]
        assert all(found[sample, own].any() for own in numbers)
        assert sorted(torch.cat(numbers).tolist()) == list(range(int(tokens.counts[sample])))
    blobs = random_regions(model, batch, tokens, found.sum(1), [[image.size] for image in images[:2]], 3)
    assert torch.equal(blobs.sum(2), found.sum(1).expand(3, -1))


def test_latents_lie_nowhere_but_look_somewhere(images: list[Image.Image], scenes: list[Scene]) -> None:
    """A resampler's region is chosen by its connector's attention; a random place has no meaning, and that is said."""
    model = HookedMM.small("idefics2", check=False)
    batch = model.prepare(images[:2], ["what", "what place is this ?"])
    tokens, _ = token_features(model, batch)
    masks = [mask_of(scene) for scene in scenes[:2]]
    found = region_tokens(model, batch, tokens, [[mask] for mask in masks])
    connector = connector_map(model, batch)
    for sample, mask in enumerate(masks):
        rows, cols = batch.layout.images[sample].patches.shape[:2]  # type: ignore[union-attr]
        side = (mask.shape[1] // cols, mask.shape[0] // rows)
        share = mask.double().mean()
        assert abs(int(found[sample].sum()) - max(1, float(share) * 36)) < 2
        place = batch.mask("image")[sample].nonzero()[:, 0].tolist()
        looked = torch.zeros(36, dtype=torch.float64)
        grid = batch.layout.images[sample].patches[..., 1].tolist()  # type: ignore[index]
        cover = {
            grid[row][col]: float(
                mask[
                    round(row * mask.shape[0] / rows) : round((row + 1) * mask.shape[0] / rows),
                    round(col * mask.shape[1] / cols) : round((col + 1) * mask.shape[1] / cols),
                ]
                .double()
                .mean()
            )
            for row in range(rows)
            for col in range(cols)
        }
        assert min(side) > 0
        entries = zip(
            *(getattr(connector, name).tolist() for name in ("sample", "position", "patch", "weight")), strict=True
        )
        for own, position, patch, weight in entries:
            if own == sample:
                looked[place.index(position)] += weight * cover[patch]
        assert looked[found[sample]].min() > looked[~found[sample]].max() - 0.02
        assert looked[found[sample]].mean() > looked.mean()
    with pytest.raises(BadInputError, match="no grid of sequence"):
        random_regions(model, batch, tokens, found.sum(1), [[image.size] for image in images[:2]], 2)
    with pytest.raises(BadInputError, match="1 pictures, but 2 masks"):
        region_tokens(model, batch, tokens, [masks, [masks[0]]])


def test_registers_are_the_tokens_of_largest_norm() -> None:
    """As numpy sorts them; what is no token is never among them."""
    values = np.random.default_rng(0).standard_normal((3, 9, 4))
    real = torch.ones(3, 9, dtype=torch.bool)
    real[1, 5:] = False
    values[1, 5:] = 100
    count = torch.tensor([3, 2, 9])
    found = largest_norm(torch.from_numpy(values), real, count)
    for sample, own in enumerate((9, 5, 9)):
        order = np.argsort(-np.linalg.norm(values[sample, :own], axis=1))[: int(count[sample])]
        assert set(found[sample].nonzero()[:, 0].tolist()) == set(order.tolist())
    with pytest.raises(BadInputError, match="6 tokens were asked for, but it has 5"):
        largest_norm(torch.from_numpy(values), real, torch.tensor([1, 6, 1]))


def test_controls_have_the_same_size_and_depend_on_seed_and_key_alone() -> None:
    """In whatever company a sample is; every token comes up equally often."""
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 7:] = False
    count = torch.tensor([4, 3])
    found = random_tokens(real, count, 200, seed=1, keys=[8, 9])
    assert torch.equal(found.sum(2), count.expand(200, 2))
    assert not (found & ~real).any()
    often = found.double().mean(0)
    torch.testing.assert_close(often[0], torch.full((12,), 4 / 12, dtype=torch.float64), rtol=0, atol=0.12)
    torch.testing.assert_close(often[1, :7], torch.full((7,), 3 / 7, dtype=torch.float64), rtol=0, atol=0.12)
    alone = random_tokens(real[1:, :7], count[1:], 200, seed=1, keys=[9])
    assert torch.equal(alone[:, 0], found[:, 1, :7])
    assert not torch.equal(random_tokens(real, count, 200, seed=2, keys=[8, 9]), found)
    orders = random_orders(real, 2)
    assert torch.equal(orders.sort(dim=2).values, torch.arange(12).expand(2, 2, 12))
    assert (orders[:, 1, 7:] == torch.arange(7, 12)).all()
    assert first_of(orders[0], real, torch.tensor([0, 7]))[1].sum() == 7


def test_random_regions_lie_side_by_side(llava: HookedMM, images: list[Image.Image]) -> None:
    """Nine tokens around one inside the grid are a square; all have the size of what they are compared with."""
    batch = llava.prepare(images[:2], "what")
    tokens, _ = token_features(llava, batch)
    count, sizes = torch.tensor([9, 4]), [[image.size] for image in images[:2]]
    found = random_regions(llava, batch, tokens, count, sizes, 20, seed=3)
    assert torch.equal(found.sum(2), count.expand(20, 2))
    assert len({tuple(row) for row in found[:, 0].int().tolist()}) > 10
    centres = random_orders(tokens.real, 20, 3)[:, 0, 0]
    for centre, own in zip(centres.tolist(), found[:, 0], strict=True):
        row, col = divmod(centre, 8)
        if 0 < row < 7 and 0 < col < 7:
            square = torch.zeros(8, 8, dtype=torch.bool)
            square[row - 1 : row + 2, col - 1 : col + 2] = True
            assert torch.equal(own.reshape(8, 8), square)
    with pytest.raises(BadInputError, match="65 tokens were asked for"):
        random_regions(llava, batch, tokens, torch.tensor([65, 1]), sizes, 1)


def test_refusals(llava: HookedMM, images: list[Image.Image]) -> None:
    """Masks that are not one per picture, shares out of range."""
    batch = llava.prepare(images[:2], "what")
    tokens, _ = token_features(llava, batch)
    mask = torch.ones(images[0].height, images[0].width, dtype=torch.bool)
    with pytest.raises(BadInputError, match="masks of 1 samples for 2"):
        region_tokens(llava, batch, tokens, [[mask]])
    with pytest.raises(BadInputError, match=r"share=0"):
        region_tokens(llava, batch, tokens, [[mask], [mask]], 0)
    with pytest.raises(BadInputError, match="1 pictures, but 2 were given"):
        region_tokens(llava, batch, tokens, [[mask, mask], [mask]])
