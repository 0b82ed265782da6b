"""Loading processors without torchvision, and how they cut pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.habits import image_token
from hooked_mm.processors import arrangement, load_processor
from tests.processors import WHOLE, WITH_VIDEO, processor, write_parts
from tests.tiny import picture

pytestmark = pytest.mark.oldest

without_torchvision = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")


@without_torchvision
@pytest.mark.parametrize("family", WITH_VIDEO)
def test_processors_with_a_video_part_load_without_it(family: str, tmp_path: Path) -> None:
    """Transformers refuses for torchvision; here the same class processes pictures as its parts do, refuses videos."""
    write_parts(family, tmp_path)
    # In 5.0 what is missing is looked for in a list that is None.
    with pytest.raises((ImportError, ValueError, TypeError), match=r"(?i)torchvision|'NoneType' is not iterable"):
        AutoProcessor.from_pretrained(tmp_path)
    name, parts = WITH_VIDEO[family]
    module = sys.modules[getattr(transformers, name).__module__]
    before = getattr(module, "num2words", "")
    made = load_processor(tmp_path)
    assert getattr(module, "num2words", "") is before
    assert type(made).__name__ == name
    shown = [[picture(40, 20)]]
    alone = parts()["image_processor"](shown, return_tensors="pt")
    together = made(images=shown, text=[f"{image_token(made)} what?"], return_tensors="pt")
    assert torch.equal(together["pixel_values"], torch.as_tensor(alone["pixel_values"]))
    assert made.chat_template == parts()["chat_template"]
    with pytest.raises(BadInputError, match="loaded without its video part; pip install torchvision"):
        made(text=[f"{made.video_token} what?"], videos=[np.zeros((2, 20, 20, 3), dtype=np.uint8)])


@without_torchvision
@pytest.mark.parametrize("family", [*WHOLE, *WITH_VIDEO])
def test_what_is_saved_loads_again(family: str, tmp_path: Path) -> None:
    """The same ids and pixels from a folder that `save_pretrained` wrote, also one of our own making."""
    processor(family).save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert type(again).__name__ == type(processor(family)).__name__
    text = "what?" if family in ("blip-2", "florence2") else f"{image_token(again)} what?"
    if family == "florence2":
        # Its image processor's length is part of no file here.
        again.num_image_tokens = 5
    first, second = (
        made(
            images=[[picture(30, 20)]] if family != "florence2" else [picture(30, 20)], text=[text], return_tensors="pt"
        )
        for made in (processor(family), again)
    )
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["pixel_values"], second["pixel_values"])


@without_torchvision
def test_processors_whose_pictures_need_torchvision_are_refused(tmp_path: Path) -> None:
    """The package to install is named."""
    images = {"image_processor_type": "Llama4ImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Llama4Processor"}))
    with pytest.raises(UnsupportedModelError, match=r"can't be loaded: (?s:.)*Remedy: pip install torchvision"):
        load_processor(tmp_path)


def test_other_troubles_stay_what_they_are(tmp_path: Path) -> None:
    """A folder without a processor is no question of packages."""
    with pytest.raises((OSError, ValueError)) as caught:
        load_processor(tmp_path)
    assert not isinstance(caught.value, UnsupportedModelError)


@given(st.integers(8, 120), st.integers(8, 120))
def test_internvl_canvases_are_those_of_its_processor(width: int, height: int) -> None:
    """The rule's count of crops is the processor's, for any shape."""
    made = processor("internvl")
    rule = arrangement(made)
    assert rule is not None
    crops = made.image_processor([Image.new("RGB", (width, height))], return_tensors="pt")["num_patches"][0]
    tiles = rule(height, width, int(crops))
    assert tiles.rows * tiles.cols + bool(tiles.overview) == crops
    with pytest.raises(BadInputError, match=f"{height} x {width} pixels was cut into 9 crops"):
        rule(height, width, 9)


def test_processors_that_never_cut_have_no_rule() -> None:
    """Or tell it otherwise."""
    assert all(arrangement(processor(family)) is None for family in ("llava", "qwen2_vl", "idefics3", "mllama"))
