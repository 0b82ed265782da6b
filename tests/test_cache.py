"""Selecting and stacking activations by modality, role and sample."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from hooked_mm.cache import ActivationCache
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.hooked import HookedMM


@pytest.fixture(scope="module")
def cache(llava: HookedMM, images: list[Image.Image]) -> ActivationCache:
    """Three samples: one image, two images, none; the first with an answer."""
    batch = llava.prepare(
        [images[0], images[1:3], None],
        ["what colour is the circle ?", "where is the star ?", "what place is this ?"],
        ["red", None, None],
    )
    return llava.run_with_cache(batch)[1]


def test_select_takes_the_positions_of_a_modality(cache: ActivationCache) -> None:
    """Row by row the values are those at the (sample, position) the selection names; counts are 36 per image."""
    name = "blocks.3.hook_resid_post"
    chosen = cache.select(name, modality="image")
    assert len(chosen) == 3 * 36
    assert chosen.sample.bincount().tolist() == [36, 72]
    for row in (0, 40, 107):
        assert torch.equal(chosen.values[row], cache[name][chosen.sample[row], chosen.position[row]])
        assert cache.batch.tokens[chosen.sample[row]][chosen.position[row]] == "<image>"


def test_select_takes_the_positions_of_a_role(cache: ActivationCache) -> None:
    """Question words are the question's; the answer is one token of the first sample; padding never appears."""
    question = cache.select("hook_embed", role="question", sample=2)
    assert [cache.batch.tokens[2][p] for p in question.position] == ["what", "place", "is", "this", "?"]
    answer = cache.select("hook_embed", role="answer")
    assert [cache.batch.tokens[s][p] for s, p in zip(answer.sample, answer.position, strict=True)] == ["red"]
    everything = cache.select("hook_embed")
    assert len(everything) == int(cache.batch.inputs["attention_mask"].sum())


def test_text_and_image_together_are_everything(cache: ActivationCache) -> None:
    """The two modalities partition the positions."""
    name = "blocks.0.attn.hook_z"
    parts = [cache.select(name, modality=m) for m in ("text", "image")]
    assert sum(map(len, parts)) == len(cache.select(name))
    assert parts[0].values.shape[1:] == (4, 32)


def test_tower_values_belong_to_the_sample_of_their_image(cache: ActivationCache) -> None:
    """The second sample owns the second and third image; patches have no role and no text."""
    chosen = cache.select("vision.blocks.1.hook_resid_post", sample=1)
    assert torch.equal(chosen.values, cache["vision.blocks.1.hook_resid_post"][1:].flatten(0, 1))
    assert chosen.sample.unique().tolist() == [1]
    assert len(cache.select("projector.hook_out", modality="text")) == 0
    assert len(cache.select("projector.hook_out", modality="image", sample=-1)) == 0
    with pytest.raises(BadInputError, match="image patches, which have no role"):
        cache.select("projector.hook_out", role="question")


def test_stack_is_select_layer_by_layer(cache: ActivationCache) -> None:
    """(layers, n, d), by short name, full name, and in the tower."""
    stacked = cache.stack("resid_post", modality="text")
    assert stacked.shape == (6, len(cache.select("hook_embed", modality="text")), 128)
    for layer in range(6):
        one = cache.select(f"blocks.{layer}.hook_resid_post", modality="text").values
        assert torch.equal(stacked[layer], one)
    assert torch.equal(stacked, cache.stack("hook_resid_post", modality="text"))
    assert cache.stack("vision.attn.hook_z").shape == (4, 3 * 37, 4, 24)


def test_names_that_are_not_there_are_told_apart(llava: HookedMM, images: list[Image.Image]) -> None:
    """Not cached and not existing are two errors; nearest names are offered."""
    batch = llava.prepare(images[:1], "what place is this ?")
    _, few = llava.run_with_cache(batch, "blocks.*.hook_resid_post")
    with pytest.raises(UnknownHookError, match=r"'blocks\.3\.hook_resid_pre' was not cached; name it in names_filter"):
        few["blocks.3.hook_resid_pre"]
    with pytest.raises(UnknownHookError, match=r"is not a hook of this model; nearest: blocks\.3\.hook_resid_post"):
        few["blocks.3.hook_resid_pst"]
    with pytest.raises(UnknownHookError, match="no layer of 'attn_out' was cached"):
        few.stack("attn_out")
    assert len(few) == 6
    assert "blocks.0.hook_resid_post" in repr(few)


def test_to_moves_and_converts(cache: ActivationCache) -> None:
    """Another dtype, the same names and batch."""
    half = cache.to("cpu", torch.float16)
    assert list(half) == list(cache)
    assert half["hook_embed"].dtype == torch.float16
    assert half.batch is cache.batch


def test_grids_lie_as_the_patches_do(cache: ActivationCache) -> None:
    """Two images of 6 x 6 tokens, row by row, at positions, projector and tower alike; refusals name the reason."""
    name = "blocks.3.hook_resid_post"
    grids = cache.grid(name, 1)
    assert [grid.shape for grid in grids] == [(6, 6, 128)] * 2
    assert torch.equal(torch.cat([grid.flatten(0, 1) for grid in grids]), cache.select(name, "image", sample=1).values)
    tower = cache.grid("vision.blocks.1.hook_resid_post", -2)
    assert torch.equal(tower[1].flatten(0, 1), cache["vision.blocks.1.hook_resid_post"][2, 1:])
    projected = cache.grid("projector.hook_out", 1)
    assert torch.equal(torch.stack(projected), torch.stack(cache.grid("hook_embed", 1)))
    assert cache.grid("hook_logits", 2) == []
    with pytest.raises(BadInputError, match="sample 3 asked of a batch of 3"):
        cache.grid(name, 3)
    with pytest.raises(BadInputError, match="image 0 has no overview of sequence: it was shown to the tower once"):
        cache.grid(name, 0, overview=True)
