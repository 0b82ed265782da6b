"""An adapter that is off leaves the base model's values bit for bit, and is on again whatever happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from hooked_mm.adapter_switch import adapters_off, adapters_on, check_switchable, lasting, read_config
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_adapter_path

peft = pytest.importorskip("peft")
HOOK = "blocks.4.hook_resid_post"


@pytest.fixture(scope="module")
def adapted() -> HookedMM:
    """The small LLaVA with one of its adapters."""
    return HookedMM.small("llava", "recoloured")


def test_off_is_the_base_model(llava: HookedMM, adapted: HookedMM, images: list[Image.Image]) -> None:
    """Values and generated tokens, bit for bit; before and after it is the adapted model; no weight gets trainable."""
    said = ["a red star in the snow .", "a blue ring in the sea ."]
    plain = llava.prepare(images[:2], "what is on the picture ?", said)
    asked = llava.prepare(images[:2], "what is on the picture ?")
    expected = llava.run_with_cache(plain, HOOK)[1][HOOK]
    before = adapted.run_with_cache(plain, HOOK)[1][HOOK]
    assert (adapters_on(llava.hf_model), adapters_on(adapted.hf_model)) == ([], ["default"])
    with adapters_off(adapted.hf_model):
        assert adapters_on(adapted.hf_model) == []
        assert torch.equal(adapted.run_with_cache(plain, HOOK)[1][HOOK], expected)
        assert torch.equal(adapted.generate(asked, 6).tokens, llava.generate(asked, 6).tokens)
    assert adapters_on(adapted.hf_model) == ["default"]
    assert torch.equal(adapted.run_with_cache(plain, HOOK)[1][HOOK], before)
    assert (before - expected).abs().max() > 0.01
    assert not any(weight.requires_grad for weight in adapted.hf_model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_on_again_whatever_happens(adapted: HookedMM, error: type[BaseException]) -> None:
    """An error or an interruption inside does not leave the adapter off."""
    with pytest.raises(error), adapters_off(adapted.hf_model):
        raise error
    assert adapters_on(adapted.hf_model) == ["default"]
    assert not any(weight.requires_grad for weight in adapted.hf_model.parameters())


def test_what_cannot_be_switched_is_refused(llava: HookedMM) -> None:
    """No adapter, a merged one, one that was put into a model from outside, and one that is off already."""
    with pytest.raises(BadInputError, match="'of this model' can't be switched off: none is on; load the base"):
        check_switchable(llava.hf_model)
    model = HookedMM.small("llava", "recoloured").hf_model
    check_switchable(model)
    inner = model.get_base_model()
    assert adapters_on(inner) == ["default"]
    with pytest.raises(BadInputError, match="'default' can't be switched off: the model is no PeftModel"):
        check_switchable(inner)
    with model.disable_adapter(), pytest.raises(BadInputError, match="none is on"):
        check_switchable(model)
    model.merge_adapter()
    with pytest.raises(BadInputError, match="it is merged into some weights"):
        check_switchable(model)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"bias": "lora_only"}, "changed biases of the base model"),
        ({"init_lora_weights": "pissa"}, "changed weights of the base model"),
    ],
)
def test_adapters_that_change_the_base_are_told(change: dict[str, Any], why: str | None) -> None:
    """A shipped adapter changes nothing of the base; trained biases and starts taken from the base do."""
    config = read_config(small_adapter_path("llava", "place"))
    for name, value in change.items():
        setattr(config, name, value)
    found = lasting(config)
    assert (found is None) if why is None else why in str(found)


def test_prompts_are_no_change_of_modules() -> None:
    """Prompt tuning puts tokens in front, which nothing in the model switches off."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "no change of modules" in str(lasting(config))
