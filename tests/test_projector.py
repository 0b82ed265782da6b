"""The embedding projector: points, words and thumbnails as TensorBoard reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from concept_dict.projector import THUMBNAIL, add_concepts, thumbnail
from hooked_mm.errors import BadInputError


def _write(folder: Path, k: int, columns: dict[str, list[str]], pictures: list[list[Image.Image]] | None) -> Path:
    with SummaryWriter(str(folder)) as writer:
        add_concepts(writer, torch.arange(k * 4.0).reshape(k, 4), columns, pictures)
    (found,) = (path.parent for path in folder.rglob("tensors.tsv"))
    return found


def test_points_words_and_thumbnails(tmp_path: Path) -> None:
    """One line and one picture per concept, in order; the configuration names all three."""
    pictures = [[Image.new("RGB", (8, 8), colour)] for colour in ("red", "lime", "blue")]
    columns = {"word": ["red", "green\tof\ngrass", ""], "fact": ["colour=red", "", "colour=blue"]}
    folder = _write(tmp_path, 3, columns, pictures)
    points = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
    assert (points == np.arange(12).reshape(3, 4)).all()
    lines = (folder / "metadata.tsv").read_text().splitlines()
    assert [line.split("\t") for line in lines] == [
        ["word", "fact"],
        ["red", "colour=red"],
        ["green of grass", ""],
        ["", "colour=blue"],
    ]
    sprite = Image.open(folder / "sprite.png").convert("RGB")
    # Three thumbnails stand in two rows of two.
    assert sprite.size == (2 * THUMBNAIL, 2 * THUMBNAIL)
    middle = THUMBNAIL // 2
    found = [sprite.getpixel((middle + x * THUMBNAIL, middle + y * THUMBNAIL)) for y, x in ((0, 0), (0, 1), (1, 0))]
    assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    written = (tmp_path / "projector_config.pbtxt").read_text()
    assert "sprite.png" in written
    assert "metadata.tsv" in written
    assert f"single_image_dim: {THUMBNAIL}" in written


@pytest.mark.parametrize("pictures", [None, [[], []]])
def test_plain_points(tmp_path: Path, pictures: list | None) -> None:
    """Without any picture there is no sheet of them, and one column has no header."""
    folder = _write(tmp_path, 2, {"word": ["a", "b"]}, pictures)
    assert (folder / "metadata.tsv").read_text().splitlines() == ["a", "b"]
    assert not (folder / "sprite.png").exists()


def test_a_thumbnail_is_the_mean_of_the_pictures() -> None:
    """Half black, half white is grey; an oblong picture leaves white above and below; none is white."""
    grey = thumbnail([Image.new("L", (9, 9), 0), Image.new("RGB", (4, 4), "white")], 6)
    assert grey.shape == (3, 6, 6)
    torch.testing.assert_close(grey, torch.full((3, 6, 6), 0.5))
    oblong = thumbnail([Image.new("RGB", (8, 4))], 8)
    assert (oblong[:, :2] == 1).all()
    assert (oblong[:, 2:6] == 0).all()
    assert (thumbnail([], 5) == 1).all()


@pytest.mark.parametrize(("columns", "pictures"), [({"word": ["a"]}, None), ({"word": ["a", "b"]}, [[]]), ({}, None)])
def test_entries_that_are_no_one_per_concept(tmp_path: Path, columns: dict, pictures: list | None) -> None:
    """Refused before anything is written; TensorBoard would name the wrong points."""
    with pytest.raises(BadInputError, match="2 concepts need"):
        _write(tmp_path, 2, columns, pictures)
