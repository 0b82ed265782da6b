"""Sheets of maps: what is drawn where."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from analyses.map_pictures import SIDE, neuron_sheet, outlined, segmentation_sheet
from analyses.neurons import Neuron
from analyses.segmentation import Case, Setting, Threshold
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset
from tests.pages import broken_links

MAGENTA = (255, 0, 200)


def test_the_rim_of_a_mask_is_drawn_inside_it() -> None:
    """One pixel wide; what lies in it stays as it is."""
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 1:3] = True
    drawn = np.array(outlined(Image.new("RGB", (4, 4), (9, 9, 9)), mask, 40))
    rim = (drawn == MAGENTA).all(-1)
    assert rim[10, 10:30].all()
    assert rim.sum() == 4 * 20 - 4
    assert (drawn[~rim] == 9).all()


def test_a_segmentation_is_three_pictures_per_case() -> None:
    """Of different scenes, side by side for every part; the sheet ends with the shorter one."""
    data = SceneDataset(3)
    cases = [
        Case(number, "red", torch.rand(8, 8, 2), (0, 0, 56, 56), torch.ones(item.height, item.width, dtype=torch.bool))
        for number in (0, 0, 1, 2)
        for item in [data.scene(number)]
    ]
    setting = Setting("max", Threshold("otsu"))
    sheet = segmentation_sheet(data, [(cases, [0, 1], setting), (cases[:3], [0, 1], setting)])
    cell = SIDE + 30 + 4
    assert sheet.size == (6 * cell + 4, 2 * cell + 4)


def test_a_neurons_row_begins_with_the_picture_that_moves_it_most(llava: HookedMM, images: list[Image.Image]) -> None:
    """As many rows as neurons."""
    cell = SIDE + 30 + 4
    sheet = neuron_sheet(llava, images[:6], [Neuron(2, 122), Neuron(4, 47)], count=3)
    assert sheet.size == (3 * cell + 4, 2 * cell + 4)
    point = "blocks.2.mlp.hook_post"
    batch = llava.prepare(images[:6], "describe the scene .")
    _, cache = llava.run_with_cache(batch, point)
    peaks = (cache[point][..., 122].abs() * batch.mask("image")).amax(1)
    first = neuron_sheet(llava, [images[int(peaks.argmax())]], [Neuron(2, 122)], count=3)
    assert np.array_equal(np.array(sheet)[4:cell, 4:cell], np.array(first)[4:cell, 4:cell])


def test_the_page_on_words_in_pictures_leads_somewhere() -> None:
    """Its links and pictures are there."""
    assert not broken_links("words_in_pictures.md", web=True)
