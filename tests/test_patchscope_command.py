"""The command for patchscopes: patches of objects beside random ones, scored by what is true of the object."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from analyses.patchscope_command import KINDS, asked_of, main
from analyses.result import Result
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.world import Scene, SceneObject


def test_the_patch_read_is_the_one_that_the_object_covers(llava: HookedMM) -> None:
    """A big square in the middle of a quarter: the patch is in it; one that covers no patch enough is not asked."""
    big = SceneObject("square", "red", "big", 0.3, 0.7, 0.2)
    scene = Scene("sea", (big, SceneObject("cross", "blue", "small", 0.8, 0.2, 0.04)), 3, 56, 56)
    found = asked_of(llava, [scene], 5, 0.9, np.random.default_rng(0))
    assert [(one.picture, one.kind, one.truth) for one in found] == [
        (5, kind, {"colour": "red", "shape": "square"}) for kind in KINDS
    ]
    batch = llava.prepare(picture(scene), "what colour is the object ?")
    first = int(batch.mask("image")[0].nonzero()[0])
    row, column = divmod(found[0].source.position - first, 8)
    assert abs((column + 0.5) / 8 - 0.3) < 0.17
    assert abs((row + 0.5) / 8 - 0.7) < 0.17


@pytest.mark.usefixtures("loaded")
def test_the_command_reads_attributes_off_patches(tmp_path: Path) -> None:
    """Far better from the object's patch than from a random one; every answer is written down."""
    few = ["--model.id", "small:llava", "--data.size", "8", "--layers", "[0, 2]", "--draws", "20"]
    main([*few, "--output", str(tmp_path / "out")])
    result = Result.load(tmp_path / "out")
    for name in ("colour", "shape"):
        ours, random = (result.of(f"{name} read from {kind}") for kind in KINDS)
        assert [score.layer for score in ours] == [0, 2]
        assert all(one.value > 0.8 > 0.5 > other.value for one, other in zip(ours, random, strict=True))
    with open(tmp_path / "out" / "reads.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * result.scores[0].rows
    assert {row["said"] for row in rows if row["truth"] == "red" and row["patch"] == KINDS[0]} <= {"red", "orange"}
    with pytest.raises(BadInputError, match=r"no object covers 1\.5 of a patch"):
        main([*few, "--share", "1.5", "--output", str(tmp_path / "none")])
