"""Selecting and stacking activations by modality, role, sample and position; saving and loading them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hooked_mm.cache import ActivationCache, chosen_positions
from hooked_mm.errors import BadInputError, StoreError, UnknownHookError
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs


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
    """Row by row the values are those at the (sample, position) the selection names; counts are 64 per image."""
    name = "blocks.3.hook_resid_post"
    chosen = cache.select(name, modality="image")
    assert len(chosen) == 3 * 64
    assert chosen.sample.bincount().tolist() == [64, 128]
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
    assert cache.stack("vision.attn.hook_z").shape == (4, 3 * 65, 4, 24)


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


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    left=st.booleans(),
    positions=st.lists(st.integers(-3, 3), min_size=1, max_size=3),
)
def test_positions_count_a_rows_own(lengths: list[int], left: bool, positions: list[int]) -> None:
    """Python's own indexing of each row without its padding, on either side; what a row lacks is refused with it."""
    own = torch.zeros(len(lengths), 8, dtype=torch.bool)
    for row, length in enumerate(lengths):
        own[row, 8 - length if left else 0 :][:length] = True
    everyone, owner = torch.ones(len(lengths), dtype=torch.bool), torch.arange(len(lengths))
    expected = torch.zeros_like(own)
    try:
        for position in positions:
            for row, mask in enumerate(own):
                expected[row, mask.nonzero().flatten().tolist()[position]] = True
    except IndexError:
        with pytest.raises(BadInputError, match=f"sample {row}: position {position} asked of {lengths[row]} positions"):
            chosen_positions(own, everyone, positions, owner)
        return
    assert torch.equal(chosen_positions(own, everyone, positions, owner), expected)


def test_positions_go_with_the_other_conditions(cache: ActivationCache) -> None:
    """The last token of each sample whatever its padding; among images only where both hold; stacked too."""
    mask = cache.batch.inputs["attention_mask"]
    last = cache.select("hook_embed", positions=-1)
    assert last.sample.tolist() == [0, 1, 2]
    assert last.position.tolist() == [int(row.nonzero().max()) for row in mask]
    first = cache.select("hook_embed", positions=[0, 1], sample=2)
    begin = int(mask[2].nonzero().min())
    assert first.position.tolist() == [begin, begin + 1]
    assert len(cache.select("hook_embed", positions=-1, modality="image")) == 0
    assert torch.equal(
        cache.stack("resid_post", positions=-1)[3], cache.select("blocks.3.hook_resid_post", positions=-1).values
    )
    patches = cache.select("vision.hook_embed", positions=[0, -1], sample=1)
    assert patches.position.tolist() == [0, 64, 0, 64]
    # Sample 2 has no 40 tokens; asked of the others alone the position is there.
    with pytest.raises(BadInputError, match="sample 2: position 40 asked of"):
        cache.select("hook_embed", positions=40)
    assert len(cache.select("hook_embed", positions=40, sample=1)) == 1


def test_packed_patches_are_selected_by_their_owner() -> None:
    """(patches, d) of a packed tower: rows in order, positions counted among a sample's own."""
    model = HookedMM(miniature("qwen2_vl"), check=False)
    _, packed = model.run_with_cache(miniature_inputs(model.hf_model, 2), "vision.hook_embed")
    value = packed["vision.hook_embed"]
    assert value.shape == (48, 32)
    assert torch.equal(packed.select("vision.hook_embed", sample=1).values, value[24:])
    ends = packed.select("vision.hook_embed", positions=-1)
    assert torch.equal(ends.values, value[[23, 47]])
    assert ends.sample.tolist() == [0, 1]
    with pytest.raises(BadInputError, match="sample 0: position 24 asked of 24 positions"):
        packed.select("vision.hook_embed", positions=24)


def test_stacks_of_an_encoder_have_its_prefix(cache: ActivationCache) -> None:
    """`encoder.` in front chooses the encoder's blocks, and only them."""
    points = {
        name: replace(cache._points["blocks.0.hook_resid_post"], name=name, layer=layer)
        for layer in range(2)
        for name in (f"encoder.blocks.{layer}.hook_resid_post", f"blocks.{layer}.hook_resid_post")
    }
    shape = (*cache.batch.modality.shape, 2)
    values = {name: torch.full(shape, float(name.startswith("encoder."))) for name in points}
    both = ActivationCache(values, cache.batch, points)
    assert both.stack("encoder.resid_post").min() == 1
    assert both.stack("resid_post").max() == 0


def bits(value: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaNs and signed zeros count too."""
    return value.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_cache_comes_back_bit_by_bit(cache: ActivationCache, tmp_path: Path, dtype: torch.dtype) -> None:
    """Every value and everything of the batch, in order; selecting and stacking need no model."""
    kept = cache.to("cpu", dtype)
    path = kept.save(tmp_path / "runs" / "one.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["one.safetensors"]
    back = ActivationCache.load(path)
    assert list(back) == list(cache)
    for name in cache:
        assert back[name].dtype == dtype
        assert back[name].shape == cache[name].shape
        assert torch.equal(bits(back[name]), bits(kept[name]))
    for name in ("modality", "role", "image_sample"):
        assert torch.equal(getattr(back.batch, name), getattr(cache.batch, name))
    assert back.batch.tokens == cache.batch.tokens
    assert list(back.batch.inputs) == list(cache.batch.inputs)
    assert all(torch.equal(back.batch.inputs[name], value) for name, value in cache.batch.inputs.items())
    chosen, before = (c.select("blocks.2.attn.hook_z", role="question", positions=-3) for c in (back, kept))
    assert torch.equal(chosen.values, before.values)
    assert torch.equal(back.stack("vision.resid_post", sample=1), kept.stack("vision.resid_post", sample=1))
    assert torch.equal(back.decompose_resid(check=False), kept.decompose_resid(check=False))
    with pytest.raises(UnknownHookError, match="is not a hook of this model"):
        back["blocks.9.hook_resid_pre"]


def test_a_loaded_cache_takes_the_model_it_is_from(llava: HookedMM, cache: ActivationCache, tmp_path: Path) -> None:
    """With the model, logits; without, the refusal says how; another model is refused."""
    made = ActivationCache(dict(cache), cache.batch, cache._points, model=llava)
    path = made.save(tmp_path / "one.safetensors")
    back = ActivationCache.load(path, model=llava)
    parts = back.decompose_resid()
    assert torch.equal(back.logit_attrs(parts, "red"), made.logit_attrs(parts, "red"))
    assert torch.equal(back.to("cpu").logit_attrs(parts, "red"), made.logit_attrs(parts, "red"))
    with pytest.raises(BadInputError, match=r"needs the model's weights.*load\(path, model=model\)"):
        ActivationCache.load(path).logit_attrs(parts, "red")
    other: Any = SimpleNamespace(
        structure=SimpleNamespace(family="llava", text=SimpleNamespace(n_layers=3, d_model=128))
    )
    with pytest.raises(StoreError, match=r"is from another model .*'n_layers': 6.* than the one given .*'n_layers': 3"):
        ActivationCache.load(path, model=other)


def test_grids_lie_as_the_patches_do(cache: ActivationCache) -> None:
    """Two images of 8 x 8 tokens, row by row, at positions, projector and tower alike; refusals name the reason."""
    name = "blocks.3.hook_resid_post"
    grids = cache.grid(name, 1)
    assert [grid.shape for grid in grids] == [(8, 8, 128)] * 2
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
