"""Final norm and unembedding alone: the same logits as transformers' modules, of the files that hold them only."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_adapter_path, small_model_path
from hooked_mm.testing.miniatures import recipe
from hooked_mm.unembedding import Unembedding
from tests.miniature_checks import shared
from tests.recording_hub import RecordingHub


def plain(model: Any, x: Tensor) -> Tensor:
    return model.lm_head(model.model.language_model.norm(x))


# By hand, from transformers' modeling files.
BY_HAND: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "llava": plain,
    "idefics2": lambda model, x: model.lm_head(model.model.text_model.norm(x)),
    "qwen2_vl": plain,
    "gemma3": plain,
    "mllama": plain,
    "florence2": lambda model, x: model.lm_head(x),
    "blip-2": lambda model, x: model.language_model.lm_head(model.language_model.model.decoder.final_layer_norm(x)),
    "gemma4": lambda model, x: 30 * torch.tanh(plain(model, x) / 30),
    "granite4_vision": lambda model, x: plain(model, x) / model.config.text_config.logits_scaling,
    "udop": lambda model, x: model.lm_head(model.decoder.final_layer_norm(x) * 64**-0.5),
    "blip": lambda model, x: model.text_decoder.cls(x),
}


def saved(model: Any, folder: Path, size: str = "30KB") -> Path:
    """The model in shards."""
    model.save_pretrained(folder, max_shard_size=size)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.mark.parametrize("family", BY_HAND)
def test_logits_are_those_of_the_model_and_other_shards_are_not_needed(family: str, tmp_path: Path) -> None:
    """Every other shard is removed first; bytes are those of the tensors, by the file itself."""
    model, folder = shared(family), saved(shared(family), tmp_path)
    found = HookedMM.unembedding(folder)
    for shard in folder.glob("*.safetensors"):
        if shard.name not in found.files:
            shard.unlink()
    again = HookedMM.unembedding(folder)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = BY_HAND[family](model, x)
    assert torch.allclose(again.to_logits(x), expected, atol=1e-6, rtol=1e-6)
    stored = {name: tensor for file in found.files for name, tensor in load_file(folder / file).items()}
    assert found.bytes_read == sum(stored[name].nbytes for name in found.names)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert found.total_bytes == index["metadata"]["total_size"]
    assert set(found.files) == {index["weight_map"][name] for name in found.names}
    assert found.bytes_read < 80_000 < found.total_bytes
    assert len(found.files) < len(set(index["weight_map"].values())) / 4
    assert (found.cfg.d_model, found.cfg.d_vocab, found.cfg.family) == (64, 200, family)
    assert found.to_logits(x).shape == (2, 3, 200)


@pytest.mark.parametrize("family", ["qwen2_vl", "smolvlm"])
def test_a_tied_unembedding_is_the_token_embedding(family: str, tmp_path: Path) -> None:
    """The checkpoint has no other."""
    known = recipe(family)
    model = known.build(family, {**copy.deepcopy(dict(known.config)), "tie_word_embeddings": True}).eval()
    found = HookedMM.unembedding(saved(model, tmp_path))
    assert any("embed_tokens" in name for name in found.names)
    x = torch.randn(4, 64)
    norm = next(
        module for path, module in model.named_modules() if path.endswith(("language_model.norm", "text_model.norm"))
    )
    with torch.no_grad():
        expected = norm(x) @ model.get_input_embeddings().weight.T
    assert torch.allclose(found.to_logits(x), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_small_models(name: str, dtype: str) -> None:
    """Of one file the needed tensors only; dtype and tokenizer are the model's own."""
    model = HookedMM.small(name, dtype=dtype, check=False)
    found = HookedMM.unembedding(small_model_path(name), dtype=dtype)
    x = torch.randn(5, model.cfg.d_model)
    assert found.dtype == model.dtype
    assert torch.equal(found.to_logits(x), model.to_logits(x))
    assert (found.cfg.d_model, found.cfg.d_vocab) == (model.cfg.d_model, model.cfg.d_vocab)
    assert found.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert found.bytes_read < 0.2 * (found.total_bytes or 0)
    assert "1 file" in repr(found)


def test_of_the_hub_only_needed_shards_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 22 shards two."""
    hub = RecordingHub(tmp_path / "hub").put_in_place(monkeypatch)
    folder = saved(shared("llava"), hub.kept / "me/x")
    config = folder / "config.json"
    monkeypatch.setattr("hooked_mm.unembedding.AutoConfig.from_pretrained", lambda *_, **__: shared("llava").config)
    written = shared("llava").config.to_dict()
    monkeypatch.setattr("hooked_mm.unembedding.PretrainedConfig.get_config_dict", lambda *_, **__: (written, {}))
    found = Unembedding.from_pretrained("me/x", revision="v1")
    downloaded = {path.name for path in (hub.kept / "snapshots/me/x").iterdir()}
    assert downloaded == {"model.safetensors.index.json", *found.files}
    assert config.name not in downloaded
    assert len(found.files) == 2
    assert len(list(folder.glob("*.safetensors"))) > 20


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """And what does not fit, and what is quantised."""
    shared("llava").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)

    def without(changed: dict[str, Tensor]) -> None:
        save_file({name: t for name, t in {**whole, **changed}.items() if t.numel()}, path, {"format": "pt"})

    norm = next(name for name in whole if name.endswith("model.norm.weight"))
    without({norm: torch.empty(0)})
    with pytest.raises(BadInputError, match=r"holds no tensor for 'model\.language_model\.norm\.weight' of Llava"):
        HookedMM.unembedding(tmp_path)
    without({norm: torch.ones(32)})
    with pytest.raises(BadInputError, match=r"does not fit its own config\.json at 'model\.language_model\.norm'"):
        HookedMM.unembedding(tmp_path)
    without({norm: torch.ones(64, dtype=torch.int8)})
    with pytest.raises(UnsupportedModelError, match=r"is quantised \(torch\.int8\)"):
        HookedMM.unembedding(tmp_path)


def test_adapters() -> None:
    """One that leaves the ends alone changes nothing."""
    own = HookedMM.unembedding(small_model_path("llava"))
    found = HookedMM.unembedding(small_model_path("llava"), adapter=small_adapter_path("llava", "colours"))
    x = torch.randn(2, own.cfg.d_model)
    assert torch.equal(found.to_logits(x), own.to_logits(x))


@pytest.mark.parametrize(
    "touches",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
    ids=["lora", "saved head", "saved norm"],
)
def test_adapters_of_the_ends_are_refused(touches: dict[str, Any], tmp_path: Path) -> None:
    """By the names of their tensors."""
    adapted = get_peft_model(copy.deepcopy(shared("llava")), LoraConfig(r=2, **touches))
    adapted.save_pretrained(tmp_path / "adapter")
    shared("llava").save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="changes the final norm or the unembedding"):
        HookedMM.unembedding(tmp_path / "model", adapter=tmp_path / "adapter")


def test_an_adapter_of_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    """It is the unembedding."""
    adapted = get_peft_model(copy.deepcopy(shared("gemma3")), LoraConfig(r=2, target_modules=["embed_tokens"]))
    adapted.save_pretrained(tmp_path / "adapter")
    shared("gemma3").save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="embed_tokens"):
        HookedMM.unembedding(tmp_path / "model", adapter=tmp_path / "adapter")
