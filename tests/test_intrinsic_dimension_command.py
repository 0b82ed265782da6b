"""`hooked-mm analyse intrinsic-dimension` on planted dimensions: as on tensors, duplicates counted."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from analyses import intrinsic_dimension_command
from analyses.analyse_command import main
from analyses.intrinsic_dimension import intrinsic_dimension
from analyses.intrinsic_dimension_command import NAMES, Settings, analyse
from analyses.layers import Layers
from analyses.result import Result
from tests.geometry import in_processes, unpainted  # noqa: F401
from tests.layered import layered_store


def planted(path: Path, samples: int = 40, each: int = 8) -> Layers:
    """Layers of 1, 2 and 4 dimensions in 12; every sample begins with the same row, but for roundings at layer 2."""
    random = torch.Generator().manual_seed(0)
    values = {}
    for layer, dimension in enumerate((1, 2, 4)):
        rows = torch.rand(samples * each, dimension, generator=random) @ torch.randn(dimension, 12, generator=random)
        rows[::each] = rows[0] + (1e-6 * torch.randn(samples, 12, generator=random) if layer == 2 else 0)
        values[layer] = rows
    number = [row // each for row in range(samples * each)]
    kinds = ["image" if row % 2 else "text" for row in range(samples * each)]
    return Layers.of_store(layered_store(path, values, number, kinds))


@pytest.mark.usefixtures("unpainted")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every layer and modality: what was planted, within noise; the rows left out, and of how many samples."""
    layers = planted(tmp_path / "store")
    main(["intrinsic-dimension", f"--store={layers.store.path}", f"--output={tmp_path / 'out'}", "--draws=30"])
    assert "left out" in capsys.readouterr().out
    found = Result.load(tmp_path / "out")
    assert found.settings["tolerance"] == 1e-5
    for modality, copies in (("all", 39), ("text", 39), ("image", 0)):
        part = layers.of(modality)
        for layer, dimension in enumerate((1, 2, 4)):
            expected = intrinsic_dimension(part.values(layer), tolerance=1e-5)
            for estimate, name in NAMES.items():
                one = next(one for one in found.of(name, modality) if one.layer == layer)
                assert one.value == pytest.approx(getattr(expected, estimate), abs=1e-9)
                assert one.low <= one.value <= one.high or estimate == "two_nn_microscope"
                assert (one.rows, one.left_out, one.samples) == (len(part) - copies, copies, 40)
                assert one.value == pytest.approx(dimension, rel=0.45)
    assert "text: rows that are copies of others (left out), by layer: 0: 39, 1: 39, 2: 39" in found.notes
    assert "image: rows that are copies of others (left out), by layer: none" in found.notes


def test_rows_that_are_not_held_give_the_same(tmp_path: Path) -> None:
    """Read block by block; and of many rows some are drawn, which is noted."""
    layers = planted(tmp_path)
    held, _ = analyse(layers, ["all"], Settings(draws=0))
    with mock.patch.object(intrinsic_dimension_command, "HELD_BYTES", 0):
        read, _ = analyse(layers, ["all"], Settings(draws=0))
    assert [one.value for one in held] == [one.value for one in read]
    few, notes = analyse(layers, ["all"], Settings(draws=0, most_rows=200))
    assert notes[0] == "all: 200 of 320 rows, drawn by chance"
    assert {one.rows + one.left_out for one in few} == {200}
    assert all(math.isnan(one.low) for one in few)


def test_processes_share_the_layers(tmp_path: Path) -> None:
    """Scores and notes are those of one process, in the order of layers."""
    layers = planted(tmp_path, samples=10)
    alone = analyse(layers, ["all", "text"], Settings(draws=5))
    for found in in_processes(lambda process: analyse(layers, ["all", "text"], Settings(draws=5), processes=process)):
        assert repr(found) == repr(alone)


def test_too_few_rows_are_noted(tmp_path: Path) -> None:
    """A layer whose rows are all the same, as where every sample has the same text."""
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    store = layered_store(tmp_path, {0: torch.ones(30, 4), 1: rows}, list(range(30)))
    scores, notes = analyse(Layers.of_store(store), ["all"], Settings(draws=3))
    assert {one.layer for one in scores} == {1}
    assert notes[0].startswith("all, layer 0: 1 of 30 rows are distinct")
    assert notes[1] == "all, layer 1: only 30 distinct rows, too few for a dimension to mean much"
