"""Molmo's configuration: what the published file says, and what it leaves to its code."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoConfig

from hooked_mm.errors import UnsupportedModelError
from hooked_mm.molmo.configuration_molmo import MolmoConfig, MolmoVisionConfig
from tests.molmo_published import image_ids, narrowed, published_config
from tests.molmo_reference import MOLMO_7B_D, Sizes


def as_sizes(config: MolmoConfig) -> Sizes:
    """The configuration in the reference's words; what it does not hold as there."""
    tower = config.vision_config
    return Sizes(
        hidden=config.hidden_size,
        fused_mlp=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        embedding=config.embedding_size,
        extra=config.additional_vocab_size,
        rope_theta=config.rope_parameters["rope_theta"],
        rms_eps=config.layer_norm_eps,
        max_positions=config.max_position_embeddings,
        tower_hidden=tower.hidden_size,
        tower_heads=tower.num_attention_heads,
        tower_mlp=tower.intermediate_size,
        tower_blocks=tower.num_hidden_layers,
        tower_taken=tuple(config.vision_feature_layer),
        tower_eps=tower.layer_norm_eps,
        patch=tower.patch_size,
        side=tower.image_size,
    )


def test_the_published_file(tmp_path: Path) -> None:
    """It names remote code, which is not run; it says nothing of the tower, which is the published one's."""
    (tmp_path / "config.json").write_text(json.dumps(published_config(MOLMO_7B_D)))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MolmoConfig
    assert asdict(as_sizes(config)) == asdict(MOLMO_7B_D)
    assert config.image_patch_id == image_ids(MOLMO_7B_D).patch
    assert (config.qkv_bias, config.tie_word_embeddings, config.use_cache) == (True, False, True)
    assert (config.vision_config.hidden_act, config.head_dim) == ("quick_gelu", 128)


def test_the_defaults_are_the_published_ones() -> None:
    assert asdict(as_sizes(MolmoConfig())) == asdict(MOLMO_7B_D)


def test_a_narrowed_one_and_back(tmp_path: Path) -> None:
    """Written and read, the tower's sizes too."""
    sizes = Sizes()
    made = MolmoConfig(**published_config(sizes), **narrowed(sizes))
    assert asdict(as_sizes(made)) == asdict(sizes)
    made.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert asdict(as_sizes(again)) == asdict(sizes)
    assert again.image_patch_id == image_ids(sizes).patch


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_norm_type", "default"),
        ("attention_layer_norm", True),
        ("norm_after", True),
        ("clip_qkv", 8.0),
        ("weight_tying", True),
        ("use_position_ids", False),
    ],
)
def test_decoders_of_another_plan_are_refused(name: str, value: object) -> None:
    """Molmo-7B-O and MolmoE differ in these; nothing is computed wrongly in silence."""
    with pytest.raises(UnsupportedModelError, match=name):
        MolmoConfig(**{name: value})


def test_what_may_be_left_out() -> None:
    """Rows of the embedding and heads of keys."""
    config = MolmoConfig(vocab_size=400, num_key_value_heads=None)
    assert (config.embedding_size, config.num_key_value_heads) == (400, 28)


def test_crops_of_an_odd_number_of_patches_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="even"):
        MolmoVisionConfig(image_size=350)
