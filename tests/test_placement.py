"""A model without memory is filled tensor by tensor, where a device map says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights

from hooked_mm.errors import BadInputError
from hooked_mm.placement import Placement
from tests.llava_folders import source_model

INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
PARTS = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1")


@pytest.fixture(scope="module")
def source() -> Any:
    return source_model()


def empty(source: Any) -> Any:
    with init_empty_weights(include_buffers=False):
        return type(source)(copy.deepcopy(source.config)).eval()


def filled(source: Any, device_map: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = empty(source)
    placement = Placement(model, device_map, dtype=dtype, **options)
    for name, value in source.named_parameters():
        placement.put(name, value)
    placement.finish()
    return model


def table(**devices: str) -> dict[str, str]:
    """Every part on the CPU, but those named (`layers_1="disk"`)."""
    made = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    made |= {f"model.language_model.{part}": "cpu" for part in PARTS}
    return made | {f"model.language_model.{part.replace('_', '.')}": device for part, device in devices.items()}


@torch.no_grad()
@pytest.mark.parametrize("device_map", [None, "cpu", "auto", "sequential", torch.device("cpu"), {"": "cpu"}])
def test_the_logits_are_the_sources(source: Any, device_map: Any) -> None:
    """Whatever the way of saying where; the weights are copies."""
    model = filled(source, device_map, **({"max_memory": {"cpu": "1GB"}} if device_map == "auto" else {}))
    assert torch.equal(model(**INPUTS).logits, source(**INPUTS).logits)
    assert model.lm_head.weight.data_ptr() != source.lm_head.weight.data_ptr()
    assert set(model.hf_device_map.values()) <= {"cpu", torch.device("cpu")}


@torch.no_grad()
def test_parts_on_disk_are_read_when_they_run(source: Any, tmp_path: Path) -> None:
    """Their weights take no memory; the logits stay."""
    model = filled(source, table(layers_0="disk", layers_1="disk"), offload_folder=tmp_path / "off")
    blocks = model.model.language_model.layers
    assert {weight.device.type for weight in blocks.parameters()} == {"meta"}
    assert torch.equal(model(**INPUTS).logits, source(**INPUTS).logits)
    assert len(list((tmp_path / "off").glob("*.dat"))) == len(list(blocks.parameters()))


def test_weights_come_in_one_dtype(source: Any) -> None:
    """Buffers keep theirs."""
    model = filled(source, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_what_does_not_fit_is_refused(source: Any) -> None:
    """Device maps, sizes, and weights that never came."""
    model = empty(source)
    for device_map, said in (
        ("nowhere", "device_map='nowhere': it must be a device"),
        ({"lm_head": "cpu"}, "gives no device for model.vision_tower"),
        ({"": "cpu", "lm_head": "disk"}, "both '' and its part 'lm_head'"),
        ({**table(), "model.language_model.layers": "disk"}, "both 'model.language_model.layers' and its part"),
        (table(layers_1="disk"), "offload_folder='...'"),
    ):
        with pytest.raises(BadInputError, match=said):
            Placement(model, device_map, dtype=torch.float32)
    placement = Placement(model, dtype=torch.float32)
    with pytest.raises(BadInputError, match=r"lm_head.weight is \(2, 3\); the model has"):
        placement.put("lm_head.weight", torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=r"never put: .*embed_tokens"):
        placement.finish()


@pytest.mark.gpu
@torch.no_grad()
def test_parts_wait_in_the_memory_of_the_cpu(source: Any) -> None:
    """Run on the accelerator, kept beside it; also all of it there."""
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    expected = source(**INPUTS).logits
    devices = dict.fromkeys(table(), 0) | {"model.language_model.layers.1": "cpu"}
    for device_map in (devices, "cuda", "auto"):
        model = filled(source, device_map)
        found = model(input_ids=INPUTS["input_ids"].cuda()).logits.cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
