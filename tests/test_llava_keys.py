"""Names of the original layout."""

from __future__ import annotations

import pytest

from hooked_mm.errors import BadInputError
from hooked_mm.llava_keys import UNUSED, UNUSED_OF_CLIP, check_names, check_settings, listed, original_name, unused
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
