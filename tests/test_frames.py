"""Which part of a picture a grid covers, checked by what changes when a part of the picture does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import SizeDict

from hooked_mm.errors import BadInputError
from hooked_mm.frames import covered
from hooked_mm.hooked import HookedMM
from hooked_mm.small import SMALL_MODELS
from tests.processors import processor
from tests.tiny import tiny

pytestmark = pytest.mark.oldest

SIZES = [(60, 60), (72, 48), (40, 72)]
PLACES = [(0.3, 0.35), (0.7, 0.6)]
MINIATURES = ["llava", "llava_next", "idefics3", "gemma3", "mllama", "blip-2", "qwen2_5_vl"]


def _patch(model: HookedMM) -> int:
    size = model.hf_model.config.vision_config.patch_size
    return size if isinstance(size, int) else size[0]


def _moved(model: HookedMM, size: tuple[int, int], place: tuple[float, float], overview: bool) -> np.ndarray:
    """How much every patch changes, before any patch has seen another, when a spot of the picture does."""
    plain = np.full((size[1], size[0], 3), 128, np.uint8)
    spotted = plain.copy()
    x, y = int(place[0] * size[0]), int(place[1] * size[1])
    spotted[y - 3 : y + 3, x - 3 : x + 3] = 255
    name = "vision.blocks.0.hook_resid_pre"
    batch = model.prepare([Image.fromarray(plain), Image.fromarray(spotted)], "what is this ?")
    _, cache = model.run_with_cache(batch, [name])
    one, other = (cache.grid(name, sample, overview)[0] for sample in (0, 1))
    return (one - other).norm(dim=-1).nan_to_num(0).numpy()


def _check(model: HookedMM, overview: bool = False, sizes: list[tuple[int, int]] = SIZES) -> None:
    for size in sizes:
        for x, y in PLACES:
            moved = _moved(model, size, (x, y), overview)
            rows, cols = moved.shape
            left, top, right, bottom = covered(model.processor, size, (rows, cols), _patch(model), overview)
            # The strongest change lies where the spot is, to half a patch and the spot's own width.
            weight = moved**2 / (moved**2).sum()
            found_x = left + (weight.sum(0) * (np.arange(cols) + 0.5)).sum() * (right - left) / cols
            found_y = top + (weight.sum(1) * (np.arange(rows) + 0.5)).sum() * (bottom - top) / rows
            assert abs(found_x - int(x * size[0])) < 0.6 * (right - left) / cols + 1, (size, x, y)
            assert abs(found_y - int(y * size[1])) < 0.6 * (bottom - top) / rows + 1, (size, x, y)


@pytest.mark.parametrize("name", list(SMALL_MODELS))
def test_a_spot_is_found_where_it_is_in_small_models(name: str) -> None:
    """Square and oblong pictures: the patches that a spot changes lie over the spot."""
    _check(HookedMM.small(name, check=False))


@pytest.mark.parametrize("family", MINIATURES)
def test_a_spot_is_found_where_it_is_in_other_families(family: str) -> None:
    """The same for processors that crop, pad on all sides or two, tile or stretch."""
    _check(HookedMM(tiny(family), processor(family), check=False))


@pytest.mark.parametrize("family", ["molmo", "llava_next"])
def test_a_spot_is_found_where_it_is_in_the_overview(family: str) -> None:
    """Beside the crops, Molmo pads the whole picture to a square, LLaVA-NeXT stretches it."""
    small = family in SMALL_MODELS
    model = HookedMM.small(family, check=False) if small else HookedMM(tiny(family), processor(family), check=False)
    _check(model, overview=True, sizes=SIZES[1:])


def _processor(name: str, **settings: Any) -> Any:
    images = type(name, (), settings)()
    return SimpleNamespace(image_processor=images)


def test_by_hand() -> None:
    """Numbers that can be done in the head."""
    assert covered(_processor("Plain"), (80, 40), (3, 3)) == (0, 0, 80, 40)
    assert covered(_processor("LlavaImageProcessor", do_pad=True), (80, 40), (8, 8)) == (0, -20, 80, 60)
    crop = {"do_center_crop": True, "crop_size": SizeDict(width=32, height=32)}
    assert covered(_processor("Clip", size=SizeDict(shortest_edge=32), **crop), (80, 40), (4, 4)) == (20, 0, 60, 40)
    # Resized to 40, of which the middle 32 stay: four fifths of the shorter side.
    assert covered(_processor("Clip", size=SizeDict(shortest_edge=40), **crop), (50, 100), (4, 4)) == (5, 30, 45, 70)
    assert covered(_processor("LlavaNextImageProcessorPil"), (80, 40), (4, 4)) == (0, -20, 80, 60)
    assert covered(_processor("LlavaNextImageProcessorPil"), (80, 40), (4, 12)) == (-20, 0, 100, 40)
    assert covered(_processor("MllamaImageProcessorPil"), (80, 40), (4, 4)) == (0, 0, 80, 80)


def test_what_cannot_be_told_is_refused() -> None:
    """No extent, or no patch where a border is left out."""
    with pytest.raises(BadInputError, match=r"a grid of \(0, 3\)"):
        covered(_processor("Plain"), (80, 40), (0, 3))
    with pytest.raises(BadInputError, match="give patch"):
        covered(_processor("Idefics2ImageProcessor", size={}), (80, 40), (3, 3))
