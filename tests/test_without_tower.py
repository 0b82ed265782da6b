"""Without its tower a model gives for texts what it gives whole, bit for bit, and needs none of the tower's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from hooked_mm.errors import BadInputError, UnknownHookError, UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.pretrained import load_model
from hooked_mm.small import small_model_path
from hooked_mm.testing.miniatures import miniature_inputs
from hooked_mm.without_tower import picture_parts, without_tower
from tests.miniature_checks import shared

# What is left out, by hand from transformers' modeling files: names of parameters begin so.
LEFT_OUT = {
    "llava": ("model.vision_tower.", "model.multi_modal_projector."),
    "idefics2": ("model.vision_model.", "model.connector."),
    "qwen2_vl": ("model.visual.",),
    "gemma3": ("model.vision_tower.", "model.multi_modal_projector."),
    "mllama": ("model.vision_model.", "model.multi_modal_projector."),
    "florence2": ("model.vision_tower.", "model.multi_modal_projector."),
    "qwen3_vl": ("model.visual.",),
    "glm4v_moe": ("model.visual.",),
}


def texts(model: Any) -> dict[str, Tensor]:
    """Two prompts of random words, one padded on the left."""
    ids = torch.randint(100, 190, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


@pytest.mark.parametrize("family", LEFT_OUT)
def test_texts_give_the_same_without_the_towers_files(family: str, tmp_path: Path) -> None:
    """Logits of the whole model loaded by transformers; shards that hold only parts of the tower are rubbish."""
    shared(family).save_pretrained(tmp_path, max_shard_size="30KB")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    _, checkpoint = without_tower(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    rest = set(index["weight_map"].values()) - set(checkpoint.opened)
    assert rest
    for shard in rest:
        (tmp_path / shard).write_bytes(b"rubbish")
    model, again = without_tower(tmp_path)
    inputs = texts(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
    kept = {name: value for name, value in whole.named_parameters() if not name.startswith(LEFT_OUT[family])}
    assert {name for name, _ in model.named_parameters()} == set(kept)
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert type(model) is type(whole)
    assert again.bytes_read == checkpoint.bytes_read < index["metadata"]["total_size"]
    # Counted in memory, a parameter once.
    assert again.bytes_read <= sum(value.nbytes for value in kept.values()) + sum(b.nbytes for b in whole.buffers())


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "mllama", "idefics2"])
def test_points_of_the_text_are_all_there(family: str, tmp_path: Path) -> None:
    """With the values that the whole model has on texts; points that need pictures are absent, and say why."""
    shared(family).save_pretrained(tmp_path)
    model, whole = HookedMM(without_tower(tmp_path)[0]), HookedMM(shared(family), check=False)
    inputs = texts(whole.hf_model)
    logits, cache = model.run_with_cache(inputs, model.hook_names)
    expected, other = whole.run_with_cache(inputs, model.hook_names)
    assert model.conformance is not None
    assert model.conformance.ok
    assert torch.equal(logits, expected)
    assert set(cache) == set(model.hook_names) == set(other)
    assert all(torch.equal(cache[name], other[name]) for name in cache)
    absent = set(whole.hook_names) - set(model.hook_names)
    reached = set(whole.run_with_cache(inputs, whole.hook_names if family != "mllama" else None)[1])
    assert not absent & reached
    for name in ("vision.hook_embed", "projector.*", *sorted(absent)[:1]):
        with pytest.raises(UnknownHookError, match="not available, because the model was loaded without its tower"):
            model.run_with_cache(inputs, name)
    with pytest.raises(BadInputError, match="a picture was given, but the model was loaded without its tower"):
        model.run_with_cache(miniature_inputs(whole.hf_model))


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_small_models_prepare_run_and_generate(name: str) -> None:
    """As the whole model does; a picture is refused with its sample."""
    whole, model = HookedMM.small(name, check=False), HookedMM.small(name, tower=False)
    asked = ["What colour is the circle?", "Describe."]
    batch = model.prepare(None, asked)
    assert torch.equal(batch.input_ids, whole.prepare(None, asked).input_ids)
    found, expected = (m.generate(batch, max_new_tokens=4, return_logits=True) for m in (model, whole))
    assert found.text == expected.text
    assert torch.equal(found.logits, expected.logits)
    assert model.hf_model.generation_config.to_dict() == whole.hf_model.generation_config.to_dict()
    assert model.hf_model.config._name_or_path == str(small_model_path(name))
    with pytest.raises(BadInputError, match="sample 1: a picture was given"):
        model.prepare([None, Image.new("RGB", (32, 32))], asked)
    assert "tower" in str(model.conformance)


def test_what_can_not_run_without_pictures_is_refused(tmp_path: Path) -> None:
    """No tower apart, an encoder that is the tower, a forward that asks for pixels; a layout of its own."""
    for family, why in (
        ("git", "no vision tower apart"),
        ("vision-encoder-decoder", "its encoder is the tower"),
        ("blip-2", "runs on no text without a picture"),
    ):
        with pytest.raises(UnsupportedModelError, match=why):
            picture_parts(shared(family))
    shared("llava").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="can't be loaded without its tower"):
        load_model(tmp_path, tower=False, trust_remote_code=True)


def test_what_the_text_needs_must_be_there(tmp_path: Path) -> None:
    """It is not made up."""
    shared("llava").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
    save_file({name: value for name, value in tensors.items() if name != gone}, path, {"format": "pt"})
    with pytest.raises(
        BadInputError, match=r"lacks 1 tensors of Llava\w+: model\.language_model\.layers\.1\.mlp\.up_proj"
    ):
        without_tower(tmp_path)


def test_dtype(tmp_path: Path) -> None:
    """As said, else the checkpoint's."""
    shared("llava").save_pretrained(tmp_path)
    assert without_tower(tmp_path)[0].dtype == torch.float32
    assert without_tower(tmp_path, dtype="bfloat16")[0].dtype == torch.bfloat16
