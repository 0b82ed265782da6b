"""The batch of a check: one sample cut from any family's batch runs as it did in company."""

from __future__ import annotations

import pytest
import torch

from hooked_mm import probe
from hooked_mm.architectures import FAMILIES
from hooked_mm.hooked import HookedMM
from hooked_mm.probe import one_sample, small_enough
from hooked_mm.testing.miniatures import miniature, miniature_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_cut_out_with_its_images(family: str) -> None:
    """The first of three samples of different sizes and tilings: alone it has the logits that it had in company."""
    model = HookedMM(miniature(family), check=False)
    inputs = miniature_inputs(model.hf_model, 3)
    batch = model._batch(inputs)
    alone = one_sample(batch, model.structure, model.hf_model.config)
    assert len(alone) == 1
    assert len(alone.layout.image_sample) == 1
    with torch.no_grad():
        whole, cut = model.hf_model(**inputs).logits[:1], model.hf_model(**alone.inputs).logits
    real = torch.ones(whole.shape[:2], dtype=torch.bool) if alone.decoder else alone.mask()
    assert torch.allclose(whole[real], cut[real], atol=1e-4)


def test_the_first_sample_with_an_image_is_taken() -> None:
    """Text alone, then a picture, then text: tensors of pictures are as many as pictures, not as samples."""
    model = HookedMM(miniature("llava"), check=False)
    inputs = miniature_inputs(model.hf_model, 1)
    ids = torch.cat([torch.ones_like(inputs["input_ids"]), inputs["input_ids"], torch.ones_like(inputs["input_ids"])])
    batch = model._batch({"input_ids": ids, "pixel_values": inputs["pixel_values"]})
    alone = one_sample(batch, model.structure, model.hf_model.config)
    assert torch.equal(alone.input_ids, inputs["input_ids"])
    assert torch.equal(alone.inputs["pixel_values"], inputs["pixel_values"])
    text = model._batch({"input_ids": ids[:1]})
    assert one_sample(text, model.structure, model.hf_model.config) is text


def test_only_large_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a check would keep decides."""
    model = HookedMM(miniature("llava"), check=False)
    batch = model._batch(miniature_inputs(model.hf_model, 3))
    assert small_enough(model, batch) is batch
    monkeypatch.setattr(probe, "MOST_BYTES", 1000)
    assert len(small_enough(model, batch)) == 1


def test_first_and_last_of_each_kind_are_looked_at() -> None:
    """Mllama's text has self-attention in 0, 2, 4 and cross-attention in 1, 3; Qwen3-VL inserts behind 0 and 1."""
    mllama, qwen = (HookedMM(miniature(family), check=False).structure for family in ("mllama", "qwen3_vl"))
    assert probe.tested_layers(mllama.text, full=False) == (0, 1, 3, 4)
    assert probe.tested_layers(qwen.text, full=False) == (0, 1, 2, 3)
    assert probe.tested_layers(qwen.text, full=True) == (0, 1, 2, 3)
