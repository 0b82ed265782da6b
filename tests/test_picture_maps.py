"""Values over pictures: where a position's value comes to lie, and that amounts are kept, by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from analyses.picture_maps import PictureMap, on_pixels, picture_maps, tower_maps
from hooked_mm.batch import Batch
from hooked_mm.connector import connector_map
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.world import Scene
from hooked_mm.testing.miniatures import miniature, miniature_inputs

QUESTION = "what place is this ?"


Small = Callable[[str], HookedMM]


def made(model: HookedMM, scenes: list[Scene]) -> tuple[HookedMM, Batch, list[Image.Image]]:
    """Two samples, the second of a picture of another shape."""
    images = [picture(scenes[0]), picture(scenes[1])]
    return model, model.prepare([[image] for image in images], [QUESTION] * 2), images


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "molmo"])
def test_a_position_lies_on_the_pixels_of_its_patch(name: str, small: Small, scenes: list[Scene]) -> None:
    model, batch, images = made(small(name), scenes)
    width, height = images[1].size
    grid = batch.layout.images[1].grid
    assert grid is not None
    rows, cols = grid.shape
    values = torch.zeros(batch.modality.shape[1])
    values[grid[2, 3]] = 5.0
    first, *overview = picture_maps(model, batch, 1, values, images[1:])
    assert (first.picture, first.overview, len(overview)) == (0, False, name == "molmo")
    left, top, right, bottom = first.box
    across, down = np.arange(width) + 0.5, np.arange(height) + 0.5
    in_column = (across - left) * cols / (right - left)
    in_row = (down - top) * rows / (bottom - top)
    expected = ((in_row >= 2) & (in_row < 3))[:, None] & ((in_column >= 3) & (in_column < 4))
    pixels = first.on_pixels(images[1].size, smooth=False).nan_to_num()
    assert np.array_equal((pixels > 0).numpy(), expected)
    assert float(pixels.max()) == 5.0
    area = (right - left) * (bottom - top) / (rows * cols)
    assert float(first.density(images[1].size, smooth=False).nan_to_num().max()) == pytest.approx(5.0 / area)


def test_the_map_of_crops_and_that_of_the_overview_add_up_by_area(small: Small, scenes: list[Scene]) -> None:
    model, batch, images = made(small("molmo"), scenes)
    layout = batch.layout.images[1]
    assert layout.grid is not None
    assert layout.overview is not None
    values = torch.zeros(batch.modality.shape[1])
    values[layout.grid.flatten()], values[layout.overview.flatten()] = 3.0, 1.0
    maps = picture_maps(model, batch, 1, values, images[1:])
    sizes = [(one.box[2] - one.box[0]) * (one.box[3] - one.box[1]) for one in maps]
    expected = 3.0 * layout.grid.numel() / sizes[0] + 1.0 * layout.overview.numel() / sizes[1]
    pixels = on_pixels(maps, 0, images[1].size)
    assert torch.allclose(pixels, torch.tensor(expected, dtype=pixels.dtype), rtol=1e-6)


def test_latents_hand_their_values_to_the_patches_they_are_made_of(small: Small, scenes: list[Scene]) -> None:
    model, batch, images = made(small("idefics2"), scenes)
    own = batch.mask("image")[1].nonzero()[:, 0]
    values = torch.zeros(batch.modality.shape[1])
    values[own[4]] = 2.0
    (found,) = picture_maps(model, batch, 1, values, images[1:])
    connector = connector_map(model, batch)
    chosen = (connector.sample == 1) & (connector.position == own[4])
    patches = batch.layout.images[1].patches
    assert patches is not None
    expected = torch.zeros(found.values.shape)
    for patch, weight in zip(connector.patch[chosen].tolist(), connector.weight[chosen].tolist(), strict=True):
        (place,) = (patches[..., 1] == patch).nonzero().tolist()
        expected[place[0], place[1]] = 2.0 * weight
    assert torch.allclose(found.values, expected, atol=1e-6)
    assert float(found.values.sum()) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_what_a_painted_patch_changes_in_the_tower_lies_where_it_was_painted(
    name: str, small: Small, scenes: list[Scene]
) -> None:
    """A square of the picture is painted; before the tower mixes patches, only those under it move."""
    model = small(name)
    first, second = picture(scenes[0]), picture(scenes[1])
    pixels = np.array(second)
    pixels[16:32, 8:24] = (255, 0, 255)
    seen = []
    for image in (second, Image.fromarray(pixels)):
        batch = model.prepare([[first], [image]], [QUESTION] * 2)
        seen.append(model.run_with_cache(batch, "vision.hook_embed", stop_at_layer=0)[1]["vision.hook_embed"])
    moved = (seen[0] - seen[1]).norm(dim=-1)
    maps = tower_maps(model, batch, 1, moved, [second])
    assert [one.overview for one in maps] == ([False, True] if name == "molmo" else [False])
    for one in maps:
        found = one.on_pixels(second.size, smooth=False).nan_to_num()
        left, top, right, bottom = one.box
        reach = max((right - left) / one.values.shape[1], (bottom - top) / one.values.shape[0]) + 2
        inside = torch.zeros(found.shape, dtype=torch.bool)
        inside[max(0, int(16 - reach)) : int(32 + reach), max(0, int(8 - reach)) : int(24 + reach)] = True
        assert float(found[17:31, 9:23].min()) > 10 * float(found[~inside].max())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("family", "lead"), [("blip", 1), ("vision-encoder-decoder", 1)])
def test_keys_of_cross_attention_lie_where_the_towers_patches_do(
    family: str, lead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four by four patches behind a class token."""
    model = HookedMM(miniature(family), check=False)
    batch = model._batch(miniature_inputs(model.hf_model, family=family))
    image = Image.new("RGB", (32, 32))
    monkeypatch.setattr("analyses.picture_maps.frame", lambda *_: (0.0, 0.0, 32.0, 32.0))
    keys = torch.arange(16 + lead).float()
    (found,) = picture_maps(model, batch, 2, keys, [image])
    assert torch.equal(found.values, (torch.arange(16).float() + lead).reshape(4, 4))


def test_bad_input_is_refused(llava: HookedMM, scenes: list[Scene]) -> None:
    images = [picture(one) for one in scenes[:2]]
    batch = llava.prepare([[image] for image in images], [QUESTION] * 2)
    values = torch.zeros(batch.modality.shape[1])
    with pytest.raises(BadInputError, match="2 pictures were given for a sample of 1"):
        picture_maps(llava, batch, 0, values, images)
    with pytest.raises(BadInputError, match="give one each"):
        picture_maps(llava, batch, 0, values[1:], images[:1])
    with pytest.raises(BadInputError, match="no map is of picture 1"):
        on_pixels([PictureMap(0, False, torch.zeros(2, 2), (0, 0, 4, 4))], 1, (4, 4))
