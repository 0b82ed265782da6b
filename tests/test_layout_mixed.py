"""Layouts of mixed architectures: a patch of the picture reaches the position that the grid says, and no other."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from hooked_mm.batch import Batch, batch_from_inputs
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs

GRIDS = {
    **dict.fromkeys(("deepseek_vl", "deepseek_vl_hybrid"), [(4, 4)] * 3),
    **dict.fromkeys(("ovis2", "qianfan_ocr"), [(2, 2)] * 3),
    **{key: [(2, 3), (3, 2), (2, 2)] for key in ("dots3_note", "minimax_m3_vl", "hyperclovax_vision_v2")},
    "minicpm_ocr": [(2, 4), (4, 2), (2, 2)],
    **{key: [(1, 2), (2, 1), (1, 1)] for key in ("minicpmv4_6", "minicpmv4_7")},
}
"""Positions (rows, cols) of the three pictures of a miniature's batch."""


@functools.cache
def still(family: str) -> HookedMM:
    """A model whose tower's attention adds nothing, so that patches meet only where they are merged."""
    model = miniature(family)
    hooked = HookedMM(model, check=False)
    outs = [f"{block.path}.{block.parts['o']}" for block in hooked.structure.vision.blocks]
    outs += [name for name, _ in model.named_modules() if name.endswith("vit_merger.self_attn.out_proj")]
    for path in outs:
        module = model.get_submodule(path)
        module.weight.zero_()
        if module.bias is not None:
            module.bias.zero_()
    return hooked


def batched(model: HookedMM, inputs: dict[str, Tensor]) -> Batch:
    """These tensors as a batch of the model."""
    return batch_from_inputs(inputs, model.structure, model.hf_model.config)


def bright(batch: Batch, cell: Tensor) -> Tensor:
    """`pixel_values` with one patch (row of the tower, patch) changed."""
    pixels = batch.inputs["pixel_values"].clone()
    row, patch = cell.tolist()
    if batch.layout.kind == "packed" and pixels.ndim == 2:
        pixels[batch.layout.tower_order[patch]] += 3
    elif batch.layout.kind == "packed":
        pixels[..., 8 * patch : 8 * patch + 8] += 3
    else:
        y, x = divmod(patch, pixels.shape[-1] // 8)
        pixels[row, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] += 3
    return pixels


@pytest.mark.parametrize("family", GRIDS)
def test_a_patch_reaches_the_position_the_grid_says(family: str) -> None:
    model = still(family)
    batch = batched(model, miniature_inputs(model.hf_model, family=family))
    _, before = model.run_with_cache(batch, "hook_embed")
    for image, shape in enumerate(GRIDS[family]):
        lies = batch.layout.images[image]
        assert lies.grid.shape == shape
        ratio = lies.patches.shape[0] // shape[0]
        for row, col in {(0, 0), (lies.patches.shape[0] - 1, 1), (1, lies.patches.shape[1] - 1)}:
            pixels = bright(batch, lies.patches[row, col])
            _, after = model.run_with_cache(batch.with_inputs({**batch.inputs, "pixel_values": pixels}), "hook_embed")
            moved = (before["hook_embed"] - after["hook_embed"]).abs().amax(dim=-1) > 1e-6
            expected = torch.zeros_like(moved)
            expected[image, lies.grid[row // ratio, col // ratio]] = True
            assert torch.equal(moved, expected)


@pytest.mark.parametrize("family", ["minicpm_ocr", "minicpmv4_6", "dots3_note"])
def test_samples_of_a_batch_are_those_of_a_batch_of_their_own(family: str) -> None:
    """Pictures in one row of pixels are taken apart, too."""
    model = HookedMM(miniature(family), check=False)
    batch = batched(model, miniature_inputs(model.hf_model, family=family))
    logits = model.run_with_hooks(batch)
    part = batch.take([2, 0])
    got = model.run_with_hooks(part)
    keep = part.inputs["attention_mask"].bool()
    torch.testing.assert_close(got[keep], logits[[2, 0]][keep], rtol=0, atol=1e-4)
    assert [image.grid.shape for image in part.layout.images] == [GRIDS[family][2], GRIDS[family][0]]


def test_patches_that_are_merged_inside_the_tower_have_no_grid_behind_that() -> None:
    """MiniCPM-V merges 2 x 2 patches behind its second block: cells of the first image would lie in another's."""
    model = HookedMM(miniature("minicpmv4_6"), check=False)
    batch = batched(model, miniature_inputs(model.hf_model))
    _, cache = model.run_with_cache(batch, ["vision.blocks.*.hook_resid_post"])
    (grid,) = cache.grid("vision.blocks.1.hook_resid_post", 2)
    torch.testing.assert_close(grid, cache["vision.blocks.1.hook_resid_post"][0, 64:].view(4, 4, -1))
    with pytest.raises(BadInputError, match="80 patches that enter this tower are merged on the way, and 20 places"):
        cache.grid("vision.blocks.2.hook_resid_post", 2)
