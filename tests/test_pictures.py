"""A store's pictures: from their files, made again as scenes, or told that there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from concept_dict.pictures import store_pictures
from hooked_mm.errors import BadInputError
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.store import ActivationStore


def _store(path: Path, samples: list[dict[str, Any]], **made_by: Any) -> ActivationStore:
    return ActivationStore.from_arrays(path, {}, [], samples, made_by)


def test_scenes_are_made_again(tmp_path: Path) -> None:
    """The same pixels as the data module gave, in whatever order samples stand, of the split, seed and count."""
    data = ScenesDataModule(9, split="validation", seed=4, count=2)
    items = [{"sample": f"s{n}", "sample_number": n, "image": None} for n in (5, 2)]
    made, why = store_pictures(_store(tmp_path / "s", items, data=data.describe()))
    assert made is not None
    assert "made again" in why
    for index, number in enumerate((2, 5)):
        (found,) = made(index)
        assert np.array_equal(np.asarray(found), np.asarray(data.dataset[number].images))


def test_files_are_read(tmp_path: Path) -> None:
    """One path, several, none for a sample; a file that is gone is named when it is wanted."""
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    one, _ = store_pictures(_store(tmp_path / "one", [{"sample": "s", "sample_number": 0, "image": path}]))
    assert one is not None
    assert one(0)[0].size == (4, 3)
    items = [
        {"sample": "s", "sample_number": 0, "image": [path, path]},
        {"sample": "t", "sample_number": 1, "image": [str(tmp_path / "gone.png")]},
        {"sample": "u", "sample_number": 2, "image": None},
    ]
    several, why = store_pictures(_store(tmp_path / "several", items))
    assert several is not None
    assert "paths" in why
    assert (len(several(0)), several(2)) == (2, [])
    with pytest.raises(BadInputError, match=r"gone.png' does not exist"):
        several(1)


@pytest.mark.parametrize("made_by", [{}, {"data": {"name": "Other"}}, {"data": {"merged": [None]}}])
def test_no_pictures(tmp_path: Path, made_by: dict) -> None:
    """Said, not guessed."""
    made, why = store_pictures(_store(tmp_path / "s", [{"sample": "s", "sample_number": 0}], **made_by))
    assert made is None
    assert why.startswith("none: ")
