"""MMVP as it is published: a table and pictures named by number, made up in a folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

ROWS = {
    1: ("Is the wing open, or not?", "(a) Open (b) Closed", "(a)"),
    2: ("Is the wing open, or not?", "(a) Open (b) Closed", "(b)"),
    9: ('Is "Z" pressed?', "(b) No (a) Yes", "(b)"),
    10: ('Is "Z" pressed?', "(b) No (a) Yes", "(a)"),
    99: ("Does it have a door?", "(a) Yes (b) No", "(a)"),
    100: ("Does it have a door?", "(a) Yes (b) No", "(b)"),
}
"""Number -> question, options (once with the second letter first), answer (99 and 100 as published, swapped)."""


def colour_of(number: int) -> tuple[int, int, int]:
    """What picture `number` is painted with."""
    return (number % 7 * 30, number * 2, 255 - number)


def write_mmvp(
    folder: Path, rows: Mapping[int, tuple[str, str, str]] = ROWS, name: str = "lndex", pictures: bool = True
) -> Path:
    """Table and pictures; the folder again."""
    (folder / "MMVP Images").mkdir(parents=True)
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow([name, "Question", "Options", "Correct Answer"])
        writer.writerows([number, *row] for number, row in rows.items())
    for number in rows if pictures else ():
        painted = np.full((24, 24, 3), colour_of(number), dtype=np.uint8)
        Image.fromarray(painted).save(folder / "MMVP Images" / f"{number}.jpg", quality=95)
    return folder
