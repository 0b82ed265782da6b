"""`hooked-mm analyse linearity` on planted layers: as on tensors, by modality, in one process or several."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from analyses.analyse_command import main
from analyses.layers import Layers
from analyses.linearity import fit, linearity
from analyses.linearity_command import Settings, analyse
from analyses.moments import pair_moments
from analyses.result import Result
from tests.geometry import SAMPLES, in_processes, stream, unpainted  # noqa: F401
from tests.layered import layered_store


@pytest.mark.usefixtures("unpainted")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every pair, the last one too, and every modality; a table of errors; counts; what the step was planted as."""
    layers = stream(tmp_path / "store")
    main(["linearity", f"--store={layers.store.path}", f"--output={tmp_path / 'out'}", "--errors", "--draws=50"])
    assert "copies of others" in capsys.readouterr().out
    found = Result.load(tmp_path / "out")
    for modality in ("all", "text", "image"):
        part = layers.of(modality)
        samples = torch.as_tensor(part.samples)
        for first in (0, 1):
            x, y = part.values(first), part.values(first + 1)
            by = {one.score: one for one in found.of("linearity", modality) + found.of("token error", modality)}
            for name, main_ in (("linearity", False), ("main contribution", True)):
                expected = linearity(x, y, main=main_, samples=samples)
                for kind, value in (
                    (name, expected.score),
                    (f"{name}, adjusted", expected.adjusted),
                    (f"{name}, held out", expected.held_out),
                ):
                    one = next(one for one in found.of(kind, modality) if one.layer == first)
                    assert one.value == pytest.approx(value, abs=1e-9)
                    assert one.low - 1e-9 <= value <= one.high + 1e-9
                    assert (one.rows, one.samples, one.left_out) == (len(part), 24, 0)
            by = next(one for one in found.of("token error", modality) if one.layer == first)
            errors = fit(pair_moments(x, y)).errors(x, y)
            assert by.value == pytest.approx(float(errors.mean()), abs=1e-9)
            table = pq.read_table(tmp_path / "out" / f"errors_{modality}.parquet")
            assert table.column(f"error_{first}").to_pylist() == pytest.approx(errors.tolist(), abs=1e-9)
            assert table.column("word").to_pylist() == part.words
    steps = {one.layer: one for one in found.of("linearity", "all")}
    assert steps[0].value == pytest.approx(1, abs=1e-9)
    assert steps[1].high < 0.99
    # Image rows hold 4 of the first rows of 24 samples, text rows the other 20.
    first = [SAMPLES.index(sample) for sample in range(24)]
    image = sum(place % 3 == 1 for place in first)
    assert (
        f"image: rows that are copies of others (they count), by layer: 0: {image - 1}, 1: {image - 1}" in found.notes
    )


def test_processes_find_the_same(tmp_path: Path) -> None:
    """Each a share of the rows: scores, bands and notes are those of one process."""
    layers = stream(tmp_path)
    alone = analyse(layers, ["all", "image"], Settings(draws=20))
    many = in_processes(lambda process: analyse(layers, ["all", "image"], Settings(draws=20), processes=process), 2)
    for scores, notes in many:
        assert notes == alone[1]
        for one, other in zip(scores, alone[0], strict=True):
            assert (one.score, one.modality, one.layer) == (other.score, other.modality, other.layer)
            assert [one.value, one.low, one.high] == pytest.approx([other.value, other.low, other.high], abs=1e-9)


def test_bands_hold_what_other_samples_give(tmp_path: Path) -> None:
    """The in-sample band is about the estimate; without draws there is none; one sample has no held-out score."""
    layers = stream(tmp_path)
    scores, _ = analyse(layers, ["all"], Settings(draws=0))
    assert all(math.isnan(one.low) for one in scores)
    single = Layers(layers.store.where(sample="s3"), layers.hooks)
    few, _ = analyse(single, ["all"], Settings(draws=5))
    assert all(math.isnan(one.value) == ("held out" in one.score) for one in few if "adjusted" not in one.score)


def test_layers_that_do_not_vary_are_noted(tmp_path: Path) -> None:
    """y = x leaves no main contribution, constant rows nothing at all."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    store = layered_store(tmp_path, {0: x, 1: x, 2: torch.ones(20, 3)}, list(range(20)))
    scores, notes = analyse(Layers.of_store(store), ["all"], Settings(draws=3))
    assert {one.score for one in scores if one.layer == 0} == {
        "linearity",
        "linearity, adjusted",
        "linearity, held out",
        "token error",
    }
    assert next(one.value for one in scores) == pytest.approx(1)
    assert [note for note in notes if "nothing varies" in note] == [
        f"all, layer {layer}: nothing varies in some of y and y - x, so it has no score" for layer in (0, 1)
    ]
