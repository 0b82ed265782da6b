"""Patching against raw hooks that copy values by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Replace
from hooked_mm.patching import Patch
from hooked_mm.positions import Positions
from hooked_mm.runner import Hook
from tests.raw import raw_hook
from tests.test_value_layout import make_batch

POINT, TOWER = "blocks.1.hook_resid_post", "projector.hook_out"
PROMPTS = ["what colour is the circle ?", "describe the scene .", "what place is this ?"]


@pytest.fixture(scope="module")
def batch(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Three prompts of different lengths, padded on the left."""
    return llava.prepare(images[:3], PROMPTS)


@pytest.fixture(scope="module")
def source(llava: HookedMM, images: list[Image.Image]) -> Any:
    """Other pictures and a longer prompt beside the same ones, so that positions lie elsewhere; padded on the right."""
    texts = [*PROMPTS, "how many objects are there ? is there a red square ? or is there a blue circle ?"]
    made = llava.prepare(images[4:8], texts, padding_side="right")
    return llava.run_with_cache(made, [POINT, "hook_embed", TOWER])[1]


def test_image_positions_are_aligned_by_their_rule(llava: HookedMM, batch: Batch, source: Any) -> None:
    """Image tokens from other pictures at other positions: the logits of a raw hook that copies row by row."""
    to, origin = batch.mask(modality="image"), source.batch.mask(modality="image")

    def copy(x: torch.Tensor) -> torch.Tensor:
        new = x.clone()
        for row, other in enumerate([2, 0, 3]):
            new[row, to[row].nonzero()[:, 0]] = source[POINT][other, origin[other].nonzero()[:, 0]]
        return new

    with raw_hook(llava.hf_model, POINT, copy), torch.no_grad():
        expected = llava.hf_model(**batch.inputs).logits
    patch = Patch(POINT, source, at="image", sample=[2, 0, -1])
    logits = llava.run_with_hooks(batch, [*patch.specs()])
    assert logits is not None
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, llava.run_with_hooks(batch))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("point", [TOWER, "hook_embed"])
def test_patched_image_tokens_answer_about_the_other_picture(
    llava: HookedMM, batch: Batch, images: list[Image.Image], source: Any, beams: int, point: str
) -> None:
    """All image tokens from other pictures: token for token what is generated from those, with beams too."""
    expected = llava.generate(llava.prepare(images[4:7], PROMPTS), 12, num_beams=beams)
    with llava.hooks([*Patch(point, source, at="image", sample=[0, 1, 2]).specs()]):
        got = llava.generate(batch, 12, num_beams=beams)
    assert torch.equal(got.tokens, expected.tokens)
    assert not torch.equal(got.tokens, llava.generate(batch, 12, num_beams=beams).tokens)


def test_a_sample_with_several_pictures(llava: HookedMM, images: list[Image.Image]) -> None:
    """First from first, second from second; some heads only; what lacks a counterpart is refused."""
    two = llava.prepare([[images[0], images[1]]], PROMPTS[:1])
    other = llava.prepare([images[2], [images[3], images[4]]], PROMPTS[:2])
    _, cache = llava.run_with_cache(other, [TOWER, "vision.blocks.1.attn.hook_z"])
    _, plain = llava.run_with_cache(two, "vision.blocks.1.attn.hook_z")
    with llava.hooks([*Patch(TOWER, cache, sample=1).specs()]):
        _, got = llava.run_with_cache(two, TOWER)
    assert torch.equal(got[TOWER], cache[TOWER][1:])
    name = "vision.blocks.1.attn.hook_z"
    with llava.hooks([*Patch(name, cache, at=[0, -1], sample=1, heads=2).specs()]):
        _, got = llava.run_with_cache(two, name)
    expected = plain[name].clone()
    expected[:, [0, -1], 2] = cache[name][1:, [0, -1], 2]
    assert torch.equal(got[name], expected)
    with pytest.raises(
        BadInputError, match=r"sample 0: image 1 at 'projector.hook_out' has no counterpart in .*sample 0"
    ):
        llava.run_with_hooks(two, [*Patch(TOWER, cache, sample=0).specs()])


def test_packed_towers_take_image_from_image() -> None:
    """(patches, d): the same patches of the same image of the sample, in a batch the other way round."""
    image = (2, 0)
    grids = torch.tensor([[1, 2, 2], [1, 1, 2]])
    here = make_batch([[image], [image]], image_grid_thw=grids)
    there = make_batch([[image], [image]], image_grid_thw=grids.flip(0))
    value, source = torch.zeros(6, 3), torch.arange(18.0).reshape(6, 3)
    hook = Hook("vision.blocks.0.hook_resid_post", 0, 0, here)
    got = Patch("vision.*", source, sample=[1, 0], batch=there).apply(value, hook)
    assert got is not None
    assert torch.equal(got, torch.cat([source[2:], source[:2]]))


def test_a_tensor_and_a_cache_do_the_same_as_replace(llava: HookedMM, batch: Batch) -> None:
    """One position per sample, from a cache, from its tensor, and put there by `Replace` with a vector per sample."""
    _, cache = llava.run_with_cache(batch, POINT)
    at, origin = Positions(role="question", index=-4), Positions(index=1)
    vectors = cache[POINT][origin.resolve(Hook(POINT, 1, 0, batch), cache[POINT].shape)]
    expected = llava.run_with_hooks(batch, [*Replace(POINT, vectors, at=at).specs()])
    assert expected is not None
    for given in (cache, cache[POINT]):
        got = llava.run_with_hooks(batch, [*Patch(POINT, given, at, origin).specs()])
        assert got is not None
        assert torch.equal(got, expected)


def refused(**options: Any) -> Callable[[Any], Patch]:
    """A patch of image positions with options that do not fit."""
    return lambda source: Patch(**{"point": POINT, "source": source, "at": "image", **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (refused(), "the batch has 3 samples and the source 4; say which to take from with sample="),
        (refused(sample=4), "sample 4 was asked of a source of 4 samples"),
        (refused(sample=[0, 1]), r"sample=\[0, 1\] names 2 for a batch of 3 samples"),
        (
            refused(sample=0, at="question"),
            "sample 1: 4 positions at .* are to be patched from 6 of the source's sample 0",
        ),
        (refused(sample=0, source_at=0), "sample 0: 64 positions at .* are to be patched from 1 of"),
        (refused(sample=0, heads=0), "heads=0 was given, but 'blocks.1.hook_resid_post' has no heads"),
        (refused(sample=0, source=torch.zeros(3, 5, 64)), "they may differ in rows and positions only"),
        (refused(sample=0, source=[1.0]), "source must be a cache or a tensor; got list"),
        (refused(point="hook_logits", sample=0), "'hook_logits' was not cached"),
    ],
)
def test_what_does_not_correspond_is_refused(
    llava: HookedMM, batch: Batch, source: Any, make: Callable[[Any], Patch], message: str
) -> None:
    """With both counts, and the sample."""
    with pytest.raises((BadInputError, UnknownHookError), match=message):
        llava.run_with_hooks(batch, [*make(source).specs()])
