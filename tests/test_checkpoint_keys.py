"""A checkpoint's names become the model's: against what loading by transformers makes of the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from hooked_mm.checkpoint_keys import kept_wide, on_meta, places, tied
from tests.miniature_checks import shared

# Renamed on load, merged experts, an encoder-decoder tied thrice.
FAMILIES = ("llava", "qwen2_vl", "mllama", "idefics2", "florence2", "glm4v_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_where_transformers_loads_to(family: str, tmp_path: Path) -> None:
    """A tensor that is changed in the file changes just the parameter of its place."""
    shared(family).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model = on_meta(shared(family).config)
    assert all(parameter.is_meta for parameter in model.parameters())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    found = places(model, stored)
    assert {place.name for place in found.values()} <= set(loaded)
    for name, place in found.items():
        if not place.merged:
            assert torch.equal(loaded[place.name], stored[name]), name
    assert any(place.merged for place in found.values()) == (family == "glm4v_moe")
    # What no tensor goes to is tied to one that has one, or made of several.
    there = {place.name for place in found.values()}
    alone = [name for name in loaded if there.isdisjoint(tied(model, name))]
    assert all("experts" in name for name in alone)


def test_what_the_model_lacks_has_a_place_nonetheless() -> None:
    """As it is called, renamed or not."""
    model = on_meta(shared("llava").config)
    found = places(model, ["nothing.of.it", "language_model.model.more.weight"])
    assert [place.name for place in found.values()] == ["nothing.of.it", "model.language_model.more.weight"]


def test_kept_wide() -> None:
    """By names in the class, in half precision only; strict ones in bfloat16, too."""
    model = nn.Module()
    model._keep_in_fp32_modules = ["wo"]
    model._keep_in_fp32_modules_strict = ["gate.weight"]
    names = ("x.wo.weight", "x.gate.weight", "x.two.weight")
    told = {kind: [kept_wide(model, name, kind) for name in names] for kind in (torch.float16, torch.bfloat16)}
    assert told == {torch.float16: [True, True, False], torch.bfloat16: [False, True, False]}
    assert not any(kept_wide(model, name, torch.float32) for name in names)
