"""The span of transformers' versions: what is installed lies in it, and the small models say the same in all of it."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from hooked_mm.hooked import HookedMM
from hooked_mm.small import SMALL_MODELS
from tests.versions import IN_CLIP, RECORDED_INSIDE

pytestmark = pytest.mark.oldest
ROOT = Path(__file__).parents[1]
# Rounded, in transformers 5.23: logits of "yes", "no", "red" and "two" behind "how many objects are there ?".
SAID = {
    "llava": [0.373, -0.353, -0.694, 11.008],
    "idefics2": [1.146, -0.292, -1.385, 10.846],
    "qwen2_vl": [0.013, 2.178, -2.028, 12.246],
    "molmo": [0.245, 0.49, -2.73, 11.407],
}


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_the_bounds_are_what_is_tested() -> None:
    """The lower bound is the oldest pin; the newest pin and the installed version lie between the bounds."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    bounds = re.search(r"transformers>=([\d.]+),<([\d.]+)", setup["options"]["install_requires"])
    assert bounds is not None
    low, high = map(_numbers, bounds.groups())
    oldest, newest = (_pins(name) for name in ("constraints-oldest.txt", "constraints.txt"))
    assert _numbers(oldest["transformers"])[: len(low)] == low
    assert set(oldest) < set(newest)
    assert low <= _numbers(oldest["transformers"]) < _numbers(newest["transformers"]) < high
    assert transformers.__version__ in (oldest["transformers"], newest["transformers"])


def test_what_differs_is_told_apart() -> None:
    """In the oldest version and the newest, one of each."""
    old = transformers.__version__.startswith("5.0.")
    assert (IN_CLIP == "vision_model.", RECORDED_INSIDE) == (old, old)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_small_models_say_the_same_in_every_version(name: str, images: list[Image.Image]) -> None:
    """Logits to rounding."""
    model = HookedMM.small(name)
    logits, _ = model.run_with_cache(model.prepare(images[:1], ["how many objects are there ?"]), ())
    ids = model.tokenizer.convert_tokens_to_ids(["yes", "no", "red", "two"])
    torch.testing.assert_close(logits[0, -1, ids], torch.tensor(SAID[name]), rtol=0, atol=2e-3)
