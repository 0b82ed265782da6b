"""Names of the original layout."""

from __future__ import annotations

import json

import pytest
from transformers import CLIPVisionConfig, LlavaConfig

from hooked_mm.errors import BadInputError
from hooked_mm.llava_keys import (
    CLIP_LARGE,
    CLIP_TOWERS,
    UNUSED,
    UNUSED_OF_CLIP,
    check_names,
    check_settings,
    is_llava_original,
    listed,
    original_name,
    unused,
)
from hooked_mm.small import small_model_path
from tests.llava_folders import PUBLISHED


@pytest.mark.parametrize(
    ("name", "projector", "original"),
    [
        ("lm_head.weight", "linear", "lm_head.weight"),
        ("model.language_model.norm.weight", "linear", "model.norm.weight"),
        (
            "model.language_model.layers.3.self_attn.q_proj.weight",
            "mlp2x_gelu",
            "model.layers.3.self_attn.q_proj.weight",
        ),
        ("model.multi_modal_projector.linear_1.bias", "mlp2x_gelu", "model.mm_projector.0.bias"),
        ("model.multi_modal_projector.linear_2.bias", "mlp2x_gelu", "model.mm_projector.2.bias"),
        ("model.multi_modal_projector.linear_1.bias", "linear", "model.mm_projector.bias"),
        ("model.multi_modal_projector.linear_2.bias", "linear", None),
        (
            "model.vision_tower.pre_layrnorm.bias",
            "linear",
            "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias",
        ),
        (
            "model.vision_tower.vision_model.pre_layrnorm.bias",
            "linear",
            "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias",
        ),
    ],
)
def test_every_weight_has_its_original_name(name: str, projector: str, original: str | None) -> None:
    """As the published checkpoints have them, whatever this version of transformers calls the tower's parts."""
    assert original_name(name, projector) == original


def test_what_is_unused_is_known_exactly() -> None:
    """A key is matched as a whole."""
    assert unused("model.layers.31.self_attn.rotary_emb.inv_freq", UNUSED)
    assert unused("model.vision_tower.vision_tower.vision_model.embeddings.position_ids", UNUSED)
    assert unused("text_model.encoder.layers.0.mlp.fc1.bias", UNUSED_OF_CLIP)
    assert not unused("model.layers.31.self_attn.rotary_emb.inv_freq.more", UNUSED)
    assert not unused("model.mm_projector.4.weight", UNUSED)
    assert not unused("vision_model.post_layernorm.bias", UNUSED_OF_CLIP)
    assert unused("lm_head.weight", UNUSED, tied=True)
    assert not unused("lm_head.weight", UNUSED)


def test_the_published_settings_are_loaded() -> None:
    """Neither of the published configurations is refused."""
    for written in PUBLISHED.values():
        check_settings(written)


def test_names_are_listed_up_to_a_number() -> None:
    """In order, and how many more there are."""
    assert listed(["b", "a"]) == "a, b"
    assert listed([str(number) for number in range(9)], most=2) == "0, 1 and 7 more"
    check_names("x", [], [])
    with pytest.raises(BadInputError, match="x lacks 1 of the tensors that its configuration asks for: k"):
        check_names("x", ["k"], ["e"])


def test_original_configurations_are_told_from_others() -> None:
    """By what config.json says: the published ones, later names, and transformers' own layout."""
    assert all(map(is_llava_original, PUBLISHED.values()))
    assert is_llava_original({**PUBLISHED["llava-1.5"], "model_type": "llava_llama"})
    assert not is_llava_original(json.loads((small_model_path("llava") / "config.json").read_text()))
    assert not is_llava_original({"model_type": "llava"})
    assert not is_llava_original({"model_type": "llava_mpt", "mm_vision_tower": "x"})
    assert not is_llava_original({})


def test_the_published_towers_need_no_file() -> None:
    """The table says what transformers' own default for the 336-pixel tower says."""

    made = CLIPVisionConfig(**CLIP_LARGE, **CLIP_TOWERS["openai/clip-vit-large-patch14-336"]).to_dict()
    theirs = LlavaConfig().vision_config.to_dict()
    assert {key: made[key] for key in made} == {key: theirs.get(key) for key in made}
