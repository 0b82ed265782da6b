"""Data sets that researchers have, as data modules for extraction; see docs/data.md.

To add one: a module with a class that reads its files into a `table.Table` (see `slake`), a line here and in the docs,
a test.
"""

from __future__ import annotations

from hooked_mm.datasets.arrow import ArrowFolder
from hooked_mm.datasets.coco import Coco
from hooked_mm.datasets.folder import ImageFolder
from hooked_mm.datasets.mmvp import Mmvp
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.slake import Slake
from hooked_mm.datasets.table import Table, TableDataModule
from hooked_mm.datasets.templates import TEMPLATES
from hooked_mm.datasets.vqa_rad import VqaRad
from hooked_mm.datasets.vqav2 import VqaV2

__all__ = [
    "TEMPLATES",
    "ArrowFolder",
    "Coco",
    "ImageFolder",
    "Mmvp",
    "Selection",
    "Slake",
    "Table",
    "TableDataModule",
    "VqaRad",
    "VqaV2",
]
