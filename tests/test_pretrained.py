"""A model loads from files as people have them."""

from __future__ import annotations

import pytest
import torch

from hooked_mm import pretrained
from hooked_mm.pretrained import load_auto, load_model
from hooked_mm.small import small_model_path


def test_a_row_of_the_table_comes_before_the_auto_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that says it fits is loaded by its own loader, with everything that was said; others by transformers."""
    folder, asked = small_model_path("llava"), []

    def fits(config: dict) -> bool:
        return config["model_type"] == "llava"

    def own(model_id: str, **options: object) -> tuple[object, object]:
        asked.append((model_id, options))
        return load_auto(model_id, **options)

    monkeypatch.setattr(pretrained, "LAYOUTS", ((fits, own),))
    model, processor = load_model(folder, dtype=torch.float32, local_files_only=True)
    told = {"dtype": torch.float32, "device_map": None, "trust_remote_code": False, "local_files_only": True}
    assert asked == [(str(folder), told)]
    assert type(processor).__name__ == "LlavaProcessor"
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    other, _ = load_model(small_model_path("idefics2"))
    assert (other.config.model_type, other.dtype, len(asked)) == ("idefics2", torch.bfloat16, 1)
