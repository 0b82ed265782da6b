"""Which module encodes what, for every kind of encoder."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, EvollaForProteinText2Text, LlamaConfig, LlamaForCausalLM

from hooked_mm.encoders import encoder_config, text_encoder, vision_config, vision_encoder
from hooked_mm.errors import UnsupportedModelError
from hooked_mm.resolve import resolve
from hooked_mm.testing.miniatures import miniature
from hooked_mm.testing.recipe import LLAMA, VOCABULARY

# By hand: paths of the tower and of the module that runs the text encoder's blocks.
ENCODERS = {
    "llava": ("model.vision_tower", None),
    "git": ("git.image_encoder", None),
    "pix2struct": ("encoder", None),
    "pp_formulanet": ("model.encoder", None),
    "vision-encoder-decoder": ("encoder", None),
    "florence2": ("model.vision_tower", "model.language_model.encoder"),
    "t5gemma2": ("model.encoder.vision_tower", "model.encoder.text_model"),
    "udop": (None, "encoder"),
    # They take ids for a decoder, for language models that are encoder-decoders; these are not.
    "blip-2": ("vision_model", None),
    "instructblip": ("vision_model", None),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_tower_and_text_encoder(family: str) -> None:
    """An encoder that reads no words is the tower; a tower inside the text encoder is found there."""
    model = miniature(family)
    paths = {id(module): path for path, module in model.named_modules()}
    tower = vision_encoder(model, VOCABULARY)
    words = text_encoder(model, tower)
    assert (paths.get(id(tower)), paths.get(id(words))) == ENCODERS[family]


@pytest.mark.parametrize(
    ("family", "vision", "words"),
    [
        ("llava", "clip_vision_model", "llama"),
        ("t5gemma2", "siglip_vision_model", "t5gemma2_text"),
        ("vision-encoder-decoder", "vit", "trocr"),
        ("pix2struct", "pix2struct_vision_model", "pix2struct_text_model"),
    ],
)
def test_their_configurations(family: str, vision: str, words: str) -> None:
    """Where the configuration of the tower lies, and that of the text that is encoded."""
    config = miniature(family).config
    assert vision_config(config).model_type == vision
    assert encoder_config(config).model_type == words


def test_no_tower_no_configuration() -> None:
    """UDOP merges patches into its text encoder: its own configuration has words."""
    assert vision_config(miniature("udop").config) is None


def test_models_that_take_no_pictures_are_refused() -> None:
    """A language model, and Evolla, which transformers maps to image-text-to-text and which reads proteins."""
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM takes no pictures"):
        resolve(LlamaForCausalLM(LlamaConfig(**LLAMA)))
    config = AutoConfig.for_model(
        "evolla",
        **{**LLAMA, "hidden_size": 32},
        aligner_num_add_layers=2,
        resampler_depth=1,
        resampler_dim_head=8,
        resampler_heads=2,
        resampler_num_latents=3,
        protein_encoder_config={
            "vocab_size": 30,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 16,
        },
    )
    with pytest.raises(UnsupportedModelError, match=r"takes no pictures.*protein_input_ids"):
        resolve(EvollaForProteinText2Text(config))
