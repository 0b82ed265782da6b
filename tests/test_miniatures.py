"""Miniatures: every family builds and runs, reproducibly, with nothing in it that hides from a check."""

from __future__ import annotations

import functools
import random
import re
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.architectures import FAMILIES
from hooked_mm.errors import BadInputError
from hooked_mm.testing import miniatures
from hooked_mm.testing.miniatures import RECIPES, known, miniature, miniature_inputs, recipe
from hooked_mm.testing.recipe import IMAGE_TOKEN

pytestmark = pytest.mark.oldest

# By hand: image positions of the three pictures. A grid of LLaVA-NeXT's or OneVision's is the overview's 4 x 4 and the
# crops' with a newline behind each row: 4 x 8, 8 x 4 and 8 x 8 (60 of 64 pixels are 7.5 of 8 columns, an uneven border
# is not cut off). Qwen merges 2 x 2 of 24, 24 and 16 patches.
COUNTS: dict[str, list[int]] = {
    **{family: [16 + 4 * 9, 16 + 8 * 5, 16 + 8 * 9] for family in ("llava_next", "llava_onevision")},
    **{family: [6, 6, 4] for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    **{family: [5] * 3 for family in ("idefics2", "blip-2")},
    **{family: [4] * 3 for family in ("idefics3", "smolvlm", "gemma3", "internvl")},
    "llava": [16] * 3,
    "mllama": [1] * 3,
    # Florence-2 puts the mean of its 4 x 4 features in front of them.
    "florence2": [17] * 3,
}


@functools.cache
def shared(family: str) -> Any:
    """A miniature (shared: leave it as it is)."""
    return miniature(family)


def test_every_proved_family_has_a_miniature() -> None:
    """The families that are said to be proved, no more and no fewer; others are refused with the nearest name."""
    assert set(RECIPES) >= set(FAMILIES)
    with pytest.raises(BadInputError, match=r"no miniature of 'qwen2_vll'.*nearest: qwen2_vl"):
        miniature("qwen2_vll")


def test_architectures_that_this_transformers_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proved ones are known to every supported version; others are refused with what is new, itself or a part."""
    assert known(FAMILIES) == FAMILIES
    monkeypatch.delitem(miniatures.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "qwen3_vl")
    monkeypatch.delitem(miniatures.CONFIG_MAPPING_NAMES, "clip_vision_model")
    assert not {"qwen3_vl", "llava"} & set(known())
    assert {"qwen2_vl", "idefics2"} <= set(known())
    version = re.escape(f"this transformers ({transformers.__version__}) does not know ")
    with pytest.raises(BadInputError, match=f"^{version}'qwen3_vl'; it needs a newer one$"):
        recipe("qwen3_vl")
    with pytest.raises(BadInputError, match=f"^{version}'clip_vision_model', a part of 'llava'; it needs a newer one$"):
        recipe("llava")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_is_a_model_bit_for_bit(family: str) -> None:
    """The same seed gives the same weights and buffers, another seed another weight everywhere; random states of torch
    and Python stay as they were.
    """
    before = torch.get_rng_state(), random.getstate()
    first, again, other = miniature(family), miniature(family), miniature(family, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.rand(3)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in first.state_dict().items())
    for name, value in first.named_parameters():
        assert not torch.equal(value, other.get_parameter(name)), name
    assert first.config.model_type == family
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_is_a_constant(family: str) -> None:
    """No gate, bias, norm gain or scale is left at zeros or ones, where what it multiplies would escape a check."""
    for name, value in shared(family).named_parameters():
        assert value.isfinite().all(), name
        if value.numel() > 1:
            assert value.std() > 1e-3, name
            assert (value == value.flatten()[0]).float().mean() < 0.5, name
        else:
            assert value.item() not in (0.0, 1.0), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_runs_and_reads_every_part(family: str) -> None:
    """Logits are finite and of the vocabulary's size, each picture changes its own sample's and no other's."""
    model = shared(family)
    inputs = miniature_inputs(model)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert logits.shape == (3, inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1], 200)
        assert logits.isfinite().all()
        assert torch.equal(logits, model(**inputs).logits)
        pixels = inputs["pixel_values"].clone()
        last = slice(48, None) if family.startswith("qwen") else slice(2, None)
        pixels[last] = torch.where(pixels[last] == 0, 0.0, 1 - pixels[last])
        other = model(**{**inputs, "pixel_values": pixels}).logits
    real = slice(None) if family == "florence2" else inputs["attention_mask"][2].bool()
    assert (other[2][real][-1] - logits[2][real][-1]).abs().max() > 1e-4
    mask = inputs["attention_mask"].bool() if family != "florence2" else torch.ones(3, 5, dtype=torch.bool)
    assert (other - logits)[:2][mask[:2]].abs().max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_are_as_many_as_the_model_has_features(family: str) -> None:
    """Counted by hand from sizes of pictures and patches; so many image tokens stand in the ids of each sample."""
    model = shared(family)
    vision = recipe(family).pictures(model.config, 3, torch.Generator().manual_seed(0))
    assert recipe(family).counts(model, vision) == COUNTS[family]
    assert (miniature_inputs(model)["input_ids"] == IMAGE_TOKEN).sum(dim=1).tolist() == COUNTS[family]


@given(
    family=st.sampled_from(FAMILIES),
    samples=st.integers(1, 4),
    seed=st.integers(0, 99),
    sides=st.permutations(["left", "right"]),
)
def test_padding_sides(family: str, samples: int, seed: int, sides: list[str]) -> None:
    """Both sides hold the same tokens and pictures, padded on the side asked for; real logits agree within rounding."""
    model = shared(family)
    made = {side: miniature_inputs(model, samples, padding_side=side, seed=seed) for side in sides}
    again = miniature_inputs(model, samples, padding_side=sides[0], seed=seed)
    assert all(torch.equal(value, again[name]) for name, value in made[sides[0]].items())
    left, right = made["left"], made["right"]
    assert torch.equal(left["pixel_values"], right["pixel_values"])
    assert left["attention_mask"][:, -1].all()
    assert right["attention_mask"][:, 0].all()
    for row in range(samples):
        masks = [found["attention_mask"][row].bool() for found in (left, right)]
        assert int(masks[0].sum()) == int(masks[1].sum())
        assert torch.equal(left["input_ids"][row][masks[0]], right["input_ids"][row][masks[1]])
        assert not left["input_ids"][row][~masks[0]].any()
        # A sequence has one beginning, and padding on one side only.
        assert (masks[0].int().diff() >= 0).all()
        assert (masks[1].int().diff() <= 0).all()
    if samples > 1:
        assert len({int(found) for found in left["attention_mask"].sum(dim=1)}) > 1
    if family == "florence2":
        # BART's encoder counts its learned positions from the left, padding included.
        return
    if family in ("llava", "idefics2", "internvl", "mllama"):
        # What others count from the mask themselves.
        for found in (left, right):
            found["position_ids"] = (found["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = [model(**found).logits for found in (left, right)]
    for row in range(samples):
        kept = [out[row][found["attention_mask"][row].bool()] for out, found in zip(logits, (left, right), strict=True)]
        assert (kept[0] - kept[1]).abs().max() <= 2e-4 * kept[0].abs().max()
