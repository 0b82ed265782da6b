"""Pools: what every part of a picture shows, counted by hand; batches of one canvas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_mm.scenes.draw import render
from hooked_mm.scenes.language import WORD_CLASSES
from hooked_mm.scenes.world import CANVASES, HELD_OUT, Scene, scene
from hooked_mm.small.families import FAMILIES
from hooked_mm.small.pool import IGNORE, Pool, part_labels, partner_words
from tests.test_families import NAMES, made, on


def hand_labels(item: Scene, masks: np.ndarray, cell: tuple[int, int, int, int], side: int | None) -> dict[str, int]:
    """What a cell (top, bottom, left, right; in pixels of the padded square if `side`) shows, pixel by pixel."""
    top, bottom, left, right = cell
    up, along = ((side - item.height) // 2, (side - item.width) // 2) if side else (0, 0)
    area = (bottom - top) * (right - left)
    cover, inside = [0.0] * len(masks), 0
    for y in range(top - up, bottom - up):
        for x in range(left - along, right - along):
            if 0 <= y < item.height and 0 <= x < item.width:
                inside += 1
                for number, one in enumerate(masks):
                    cover[number] += one[y, x] / area
    owner = item.objects[cover.index(max(cover))] if max(cover) > 0.15 else None
    labels = {
        f"{name}s": IGNORE if owner is None else WORD_CLASSES[f"{name}s"].index(getattr(owner, name))
        for name in ("shape", "colour", "size", "position")
    }
    empty = sum(cover) < 0.02 and inside > 0.9 * area
    return {
        **labels,
        "places": WORD_CLASSES["places"].index(item.place) if empty else IGNORE,
        "object": int(owner is not None),
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_part_labels(canvas: tuple[int, int], padded: bool) -> None:
    """Every cell of grids that divide the picture or not, padded or not, against plain loops."""
    item = on(canvas)
    _, masks = render(item)
    side = max(canvas) if padded else None
    height, width = (side, side) if side else (item.height, item.width)
    kinds = set()
    for rows, cols in ((8, 8), (6, 6), (height // 8, width // 8)):
        got = part_labels(item, masks, rows, cols, padded)
        for number in range(rows * cols):
            row, col = divmod(number, cols)
            # Where cells do not divide the picture they overlap: from the floor of one edge to the ceiling of the next.
            cell = (
                row * height // rows,
                -(-(row + 1) * height // rows),
                col * width // cols,
                -(-(col + 1) * width // cols),
            )
            expected = hand_labels(item, masks, cell, side)
            assert {name: int(values[number]) for name, values in got.items()} == expected
            kinds.add((expected["object"], expected["places"] != IGNORE))
    assert {(0, True), (1, False)} <= kinds


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


@pytest.mark.parametrize("name", NAMES)
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
