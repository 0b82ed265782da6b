"""Labels: what every part of a picture shows, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_mm.scenes.draw import render
from hooked_mm.scenes.language import WORD_CLASSES
from hooked_mm.scenes.world import CANVASES, Scene
from hooked_mm.small.labels import IGNORE, part_labels
from tests.test_families import on


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
