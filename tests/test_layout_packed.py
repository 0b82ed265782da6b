"""Layouts of packed towers against the processors' own order of patches and the models' own flow, cell by cell."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch, batch_from_inputs
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, recipe
from hooked_mm.testing.recipe import IMAGE_TOKEN

# Architecture -> whose image processor cuts its pictures.
PROCESSORS = {
    "cosmos3_edge": "cosmos3_edge.Cosmos3EdgeImageProcessorPil",
    "ernie4_5_vl_moe": "ernie4_5_vl_moe.Ernie4_5_VLMoeImageProcessorPil",
    "exaone4_5": "qwen2_vl.Qwen2VLImageProcessorPil",
    "glm4v": "glm4v.Glm4vImageProcessorPil",
    "hunyuan_vl": "hunyuan_vl.HunYuanVLImageProcessorPil",
    # Its processor needs torchvision: cut by hand.
    "kimi_k25": "",
    "paddleocr_vl": "paddleocr_vl.PaddleOCRVLImageProcessorPil",
    "qwen2_5_omni_thinker": "qwen2_vl.Qwen2VLImageProcessorPil",
    "qwen3_5": "qwen2_vl.Qwen2VLImageProcessorPil",
    "video_llama_3": "video_llama_3.VideoLlama3ImageProcessorPil",
}
SIZES = ((4, 6), (6, 4))
"""Patches (rows, cols) of the two pictures of one sample."""
TEMPORAL = {"qwen2_vl": 2, "glm4v": 2}


def pictures(changed: tuple[int, int, int] | None = None) -> list[np.ndarray]:
    """Two pictures of noise; of one of them (number, row, col of a patch) a patch is other noise."""
    noise = np.random.default_rng(0)
    found = [noise.integers(0, 255, (rows * 8, cols * 8, 3), dtype=np.uint8) for rows, cols in SIZES]
    if changed is not None:
        number, row, col = changed
        found[number][row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] ^= 255
    return found


def row_by_row(images: list[np.ndarray]) -> dict[str, Tensor]:
    """Little pictures of 8 x 8 pixels, row by row."""
    cells = [
        torch.tensor(image / 255, dtype=torch.float32)
        .unflatten(0, (-1, 8))
        .unflatten(2, (-1, 8))
        .permute(0, 2, 4, 1, 3)
        for image in images
    ]
    grids = torch.tensor([(1, *cell.shape[:2]) for cell in cells])
    return {"pixel_values": torch.cat([cell.flatten(0, 1) for cell in cells]), "image_grid_thw": grids}


def cut(family: str, images: list[np.ndarray]) -> dict[str, Tensor]:
    """The vision tensors, by the processor that transformers has for them."""
    if not PROCESSORS[family]:
        return row_by_row(images)
    module, name = PROCESSORS[family].split(".")
    source = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    settings = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": TEMPORAL.get(module, 1)}
    processor = getattr(source, name)(do_resize=False, **settings)
    return dict(processor(images=[Image.fromarray(image) for image in images], return_tensors="pt"))


@pytest.fixture(scope="module", params=PROCESSORS)
def case(request: pytest.FixtureRequest) -> tuple[str, HookedMM]:
    """An architecture and its miniature."""
    return request.param, HookedMM(miniature(request.param), check=False)


def batch(family: str, model: HookedMM, vision: dict[str, Tensor]) -> Batch:
    """One sample with both pictures."""
    found = recipe(family)
    counts = found.counts(model.hf_model, vision)
    row = [1, 5, *found.ids(counts[0]), 9, *found.ids(counts[1]), 7, 8]
    ids = torch.tensor([row])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **vision}
    inputs |= found.extra(model.hf_model.config, inputs)
    return batch_from_inputs(inputs, model.structure, model.hf_model.config)


def apart(model: HookedMM, one: Batch) -> dict[str, Tensor]:
    """What flows where no patch sees another: attention of the tower adds nothing."""
    silent: Any = [("vision.blocks.*.hook_attn_out", lambda value, hook: torch.zeros_like(value))]
    with model.hooks(silent):
        _, cache = model.run_with_cache(one, ["vision.hook_embed", "projector.hook_out", "hook_embed"])
    return dict(cache)


def test_every_patch_is_where_the_layout_says(case: tuple[str, HookedMM]) -> None:
    """Other pixels in one cell of a picture: that patch, that token and that position change, and no others."""
    family, model = case
    plain = batch(family, model, cut(family, pictures()))
    assert plain.layout.kind == "packed"
    assert [int(plain.separator.sum()), plain.input_ids.shape[1]] == {
        # A token before, one behind each of two and three rows, and one at the end.
        "hunyuan_vl": [4 + 5, 5 + 12 + 9],
        "ernie4_5_vl_moe": [0, 5 + 12 + 4],
        "qwen2_5_omni_thinker": [0, 5 + 12 + 4],
    }.get(family, [0, 5 + 12])
    before = apart(model, plain)
    for number, (rows, cols) in enumerate(SIZES):
        image = plain.layout.images[number]
        assert image.grid.shape == (rows // 2, cols // 2)
        assert image.patches.shape[:2] == (rows, cols)
        for row, col in ((0, 0), (0, 3), (1, 2), (rows - 1, cols - 1), (2, 1)):
            other = batch(family, model, cut(family, pictures((number, row, col))))
            after = apart(model, other)
            moved = {
                name: (before[name] != after[name]).flatten(0, -2).any(dim=-1).nonzero().flatten().tolist()
                for name in before
            }
            assert moved["vision.hook_embed"] == [int(image.patches[row, col, 1])], (number, row, col)
            assert moved["projector.hook_out"] == [int(image.tokens[row // 2, col // 2, 1])], (number, row, col)
            assert moved["hook_embed"] == [int(image.grid[row // 2, col // 2])], (number, row, col)


def test_image_positions_hold_the_tokens(case: tuple[str, HookedMM]) -> None:
    """The embeddings at an image's positions are the projector's, in order, its marks included."""
    family, model = case
    one = batch(family, model, cut(family, pictures()))
    _, cache = model.run_with_cache(one, ["projector.hook_out", "hook_embed"])
    image = one.input_ids[0] == IMAGE_TOKEN
    assert torch.equal(cache["hook_embed"][0, image], cache["projector.hook_out"].flatten(0, -2))
    assert torch.equal(image, one.image_index[0] >= 0)
