"""A picture is encoded once where that changes nothing, and where it would change something that is noticed."""

from __future__ import annotations

import pytest
import torch

import hooked_mm.image_reuse as module
from hooked_mm.batch import Batch
from hooked_mm.data import Sample
from hooked_mm.hooked import HookedMM
from hooked_mm.image_reuse import encode, proven, without_pictures, write_features
from hooked_mm.loading import BatchMaker
from tests.processors import processor
from tests.tiny import picture, tiny

ELSEWHERE = {"mllama", "qwen3_vl"}
"""Features enter by cross-attention, or between layers too."""

ONE_WAY = (
    *("llava", "llava_next", "llava_onevision", "idefics2", "idefics3", "internvl", "gemma3"),
    *("qwen2_vl", "qwen2_5_vl"),
)
TEXTS = ("what is the colour ?", "where is it ?", "describe the picture.", "what is it ?")


def shared(family: str) -> tuple[HookedMM, Batch, Batch, tuple[int, ...]]:
    """A tiny model, and four questions about two pictures."""
    model = HookedMM(tiny(family), processor(family), check=False)
    one, other = picture(40, 40, seed=1), picture(56, 40, seed=2)
    shown = zip((one, other, one, one), TEXTS, strict=True)
    samples = [Sample(f"s{number}", image, text) for number, (image, text) in enumerate(shown)]
    made = BatchMaker(samples, model, "none")(range(4))
    assert made.batch is not None
    assert made.pictures is not None
    return model, made.batch, made.pictures, made.picture_of


@pytest.mark.parametrize("family", ONE_WAY)
def test_encoded_once_is_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream, the logits and a generation are those of the pictures themselves, and the tower sees only two."""
    model, batch, pictures, picture_of = shared(family)
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert proven(model, batch, pictures, picture_of, hooks)
    logits, cache = model.run_with_cache(batch, hooks)
    said = model.generate(batch, 4)
    features = encode(model, pictures)
    assert len(features) == len(set(picture_of)) == 2
    bare = without_pictures(batch)
    with model.hooks([write_features(batch, features, picture_of)]):
        other_logits, other = model.run_with_cache(bare, hooks)
        same = model.generate(bare, 4)
    real = batch.inputs["attention_mask"].bool()
    assert logits is not None
    assert other_logits is not None
    torch.testing.assert_close(other_logits[real], logits[real], atol=1e-4, rtol=1e-4)
    for name in hooks:
        torch.testing.assert_close(other[name][real], cache[name][real], atol=1e-4, rtol=1e-4)
    assert same.text == said.text
    # Features that are not the picture's are noticed.
    monkeypatch.setattr(module, "encode", lambda *_: [0.9 * value for value in features])
    assert not proven(model, batch, pictures, picture_of, hooks)


@pytest.mark.parametrize("family", sorted(ELSEWHERE))
def test_features_that_enter_elsewhere_are_noticed(family: str) -> None:
    """Written at the embedding alone they would be missing between the layers."""
    model, batch, pictures, picture_of = shared(family)
    assert not proven(model, batch, pictures, picture_of, ["blocks.1.hook_resid_post"])
