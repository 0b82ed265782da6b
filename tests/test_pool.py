"""Pools: scenes by canvas, labels in the order of patches, batches of one canvas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_mm.scenes.draw import render
from hooked_mm.scenes.language import WORD_CLASSES
from hooked_mm.scenes.world import HELD_OUT, scene
from hooked_mm.small.families import FAMILIES
from hooked_mm.small.labels import IGNORE, part_labels
from hooked_mm.small.pool import Pool, partner_words
from tests.test_families import WHOLE, made


def test_partner_words() -> None:
    """For each shape its held-out colour, for each colour its held-out shape."""
    partner = partner_words()
    colours, shapes = WORD_CLASSES["colours"], WORD_CLASSES["shapes"]
    pairs = {(shapes[n], colours[c]) for n, c in enumerate(partner["colours"].tolist()) if c != IGNORE}
    assert pairs == set(HELD_OUT.items())
    assert {(shapes[s], colours[n]) for n, s in enumerate(partner["shapes"].tolist()) if s != IGNORE} == pairs
    assert partner["colours"].shape == (len(shapes),)
    assert partner["shapes"].shape == (len(colours),)


def numbers(count: int) -> list[tuple[str, int, int]]:
    """The first training scenes."""
    return [("train", 0, index) for index in range(count)]


def test_groups() -> None:
    """Scenes by canvas, in order, none lost; which are grey does not depend on how scenes are dealt out."""
    family, processor = FAMILIES["llava"], made("llava")[1]
    whole = Pool(family, processor, numbers(40))
    parts = [Pool(family, processor, numbers(40)[rank::2]) for rank in (0, 1)]
    grey = {}
    for canvas, group in whole.groups.items():
        assert all(f"{item.width} x {item.height}" == canvas for item in group.scenes)
        grey |= dict(zip(group.scenes, group.grey.tolist(), strict=True))
    assert set(grey) == {scene("train", index) for index in range(40)}
    assert 5 < sum(grey.values()) < 22
    for part in parts:
        for group in part.groups.values():
            assert group.grey.tolist() == [grey[item] for item in group.scenes]
            assert group.pixels["pixel_values"].dtype == torch.float16


@pytest.mark.parametrize("name", WHOLE)
def test_labels_stand_with_their_patches(name: str) -> None:
    """Patch labels are those of the grid's cells, in the tower's order; tokens' row by row."""
    family = FAMILIES[name]
    pool = Pool(family, made(name)[1], numbers(4))
    for group in pool.groups.values():
        width, height = group.scenes[0].width, group.scenes[0].height
        grid = family.patch_grid(width, height)
        order = family.patch_order(*grid)
        for row, item in enumerate(group.scenes):
            masks = render(item)[1]
            cells = part_labels(item, masks, *grid, family.padded)
            tokens = part_labels(item, masks, *family.token_grid(width, height), family.padded)
            for key in cells:
                assert group.patches[key][row].tolist() == [int(cells[key][int(cell)]) for cell in order]
                assert torch.equal(group.tokens[key][row], tokens[key])


def test_pictures_grey_only_where_wanted() -> None:
    """Grey pictures have equal channels, the others are as they were; the pool itself keeps its colours."""
    pool = Pool(FAMILIES["llava"], made("llava")[1], numbers(12), grey=0.5)
    assert {bool(g) for group in pool.groups.values() for g in group.grey} == {True, False}
    for group in pool.groups.values():
        rows = np.arange(len(group.scenes))
        plain = pool.pictures(group, rows, some_grey=False)["pixel_values"]
        shown = pool.pictures(group, rows, some_grey=True)["pixel_values"]
        assert torch.equal(shown[~group.grey], plain[~group.grey])
        for grey, before in zip(shown[group.grey], plain[group.grey], strict=True):
            torch.testing.assert_close(grey, before.mean(0).expand(3, -1, -1))
        assert torch.equal(pool.pictures(group, rows, some_grey=False)["pixel_values"], plain)


def test_batches() -> None:
    """One canvas each, every scene once per pass over its group, as the seed says."""
    pool = Pool(FAMILIES["llava"], made("llava")[1], numbers(30))
    size, steps = 2, 150
    drawn: dict[str, list[int]] = {canvas: [] for canvas in pool.groups}
    seeds = []
    for canvas, rows, seed in pool.batches(size, steps, [3, 1]):
        assert len(rows) == size
        drawn[canvas] += rows.tolist()
        seeds.append(tuple(seed))
    assert seeds == [(3, 1, step) for step in range(steps)]
    for canvas, group in pool.groups.items():
        count, found = len(group.scenes), drawn[canvas]
        assert len(found) > count
        for start in range(0, len(found) - count + 1, count):
            assert sorted(found[start : start + count]) == list(range(count))

    def run(seed: int) -> list[list[int]]:
        return [rows.tolist() for _, rows, _ in pool.batches(size, 20, [seed])]

    assert run(1) == run(1) != run(2)
