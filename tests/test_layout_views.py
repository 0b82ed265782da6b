"""Pages that readers of documents see whole and in crops: where their positions lie, and what is refused of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from tests.test_layout_mixed import batched


def pages(local: int, tokens: tuple[int, int], grids: list[list[int]] | None = None) -> dict[str, Any]:
    """Two pages, in two crops and in one; so many positions each."""
    generator = torch.Generator().manual_seed(0)
    rows = [[1, 5, *[150] * count, 7, 8] for count in tokens]
    ids = torch.tensor([[0] * (max(map(len, rows)) - len(row)) + row for row in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "pixel_values_local": torch.randn(3, 3, local, local, generator=generator),
        "num_local_patches": torch.tensor([2, 1]),
    }
    return inputs if grids is None else {**inputs, "patches_grid": torch.tensor(grids)}


def test_pages_of_learned_queries() -> None:
    """DeepSeek-OCR 2: 144 latents per view and a mark; the tower runs twice, so its points are refused by name."""
    model = HookedMM(miniature("deepseek_ocr2"), check=False)
    inputs = pages(64, (3 * 144 + 1, 2 * 144 + 1))
    logits, _ = model.run_with_cache(inputs, "blocks.*.hook_resid_post")
    torch.testing.assert_close(logits, model.hf_model(**inputs).logits, rtol=0, atol=0)
    batch = batched(model, inputs)
    assert batch.layout.kind == "resampled"
    assert batch.layout.separator.sum(dim=1).tolist() == [1, 1]
    assert (batch.layout.separator.nonzero()[:, 1] == inputs["input_ids"].shape[1] - 3).all()
    for name in ("vision.blocks.1.hook_resid_post", "projector.hook_out", "vision.blocks.0.attn.hook_pattern"):
        with pytest.raises(BadInputError, match=f"{name}' lies in a module that runs 2 times on this batch"):
            model.run_with_cache(inputs, name)
    with pytest.raises(BadInputError, match="no tensor num_local_patches"):
        batched(model, {name: value for name, value in inputs.items() if name != "num_local_patches"})


def test_pages_with_newlines() -> None:
    """Unlimited-OCR: lines of tokens with a newline behind each, crops first; every position has its place."""
    model = HookedMM(miniature("unlimited_ocr"), check=False)
    whole = batched(model, miniature_inputs(model.hf_model))
    assert whole.layout.kind == "crops"
    for image, sample in zip(whole.layout.images, range(3), strict=True):
        first = int((whole.inputs["input_ids"][sample] == 150).nonzero()[0])
        assert (image.grid - first).tolist() == [[0, 1], [3, 4]]
        assert (whole.layout.separator[sample].nonzero()[:, 0] - first).tolist() == [2, 5, 6]
    _, cache = model.run_with_cache(whole, ["vision.blocks.2.hook_resid_post", "projector.hook_out", "hook_embed"])
    # A class token stands before the patches in the tower, and is gone behind it.
    tower = cache["vision.blocks.2.hook_resid_post"][1, 1:].view(2, 2, -1)
    torch.testing.assert_close(cache.grid("vision.blocks.2.hook_resid_post", 1)[0], tower)
    torch.testing.assert_close(cache.grid("projector.hook_out", 1), cache.grid("hook_embed", 1), rtol=0, atol=1e-6)
    # One token per crop, two to a row; one token; four on each page.
    batch = batched(model, pages(32, (3 + 7, 2 + 7), [[2, 1], [1, 1]]))
    one, other = batch.layout.images
    start = [int((row == 150).nonzero()[0]) for row in batch.inputs["input_ids"]]
    assert (one.grid - start[0]).tolist() == [[0, 1]]
    assert (one.overview - start[0]).tolist() == [[3, 4], [6, 7]]
    assert (other.grid - start[1]).tolist() == [[0]]
    assert (other.overview - start[1]).tolist() == [[2, 3], [5, 6]]
