"""The shipped model: small, plain, and found by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from hooked_mm.errors import BadInputError
from hooked_mm.scenes.world import Scene
from hooked_mm.small import SMALL_MODELS, small_model_path


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_shipped_models_are_small_and_in_bfloat16(name: str) -> None:
    """At most 4 MB of weights, all of them bfloat16, and nothing in the folder that needs pickle."""
    folder = small_model_path(name)
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        assert {tensors.get_slice(key).get_dtype() for key in names} == {"BF16"}
        # Weights that could not have come out of training would be worth nothing.
        assert all(torch.isfinite(tensors.get_tensor(key)).all() for key in names)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jinja", ".safetensors", ".md"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_transformers_alone_loads_and_asks_it(images: list[Image.Image], scenes: list[Scene]) -> None:
    """Without any code of ours: load, ask where each picture was taken, and get it right nearly always."""
    folder = small_model_path("llava")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(model, LlavaForConditionalGeneration)
    content = [{"type": "image"}, {"type": "text", "text": "what place is this ?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(
        text=[prompt] * 24, images=images, return_tensors="pt", add_special_tokens=False, padding_side="left"
    )
    made = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    said = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(text.strip() == item.place for text, item in zip(said, scenes, strict=True)) >= 23


def test_unknown_names_are_refused() -> None:
    """The nearest and all names are offered."""
    with pytest.raises(BadInputError, match=r"'lava'; nearest: llava; there are: llava"):
        small_model_path("lava")


def test_the_path_is_a_folder_of_the_package() -> None:
    """Where `from_pretrained` finds everything it needs."""
    folder = small_model_path("llava")
    assert isinstance(folder, Path)
    needed = {
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    }
    assert needed <= {path.name for path in folder.iterdir()}
