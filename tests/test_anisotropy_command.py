"""`hooked-mm analyse anisotropy` on planted layers: as on tensors, by modality, in one process or several."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from analyses.analyse_command import main
from analyses.anisotropy import anisotropy, mean_cosine
from analyses.anisotropy_command import Settings, analyse, cosine_of_length
from analyses.layers import Layers
from analyses.resampling import of_rows
from analyses.result import Result
from tests.geometry import in_processes, stream
from tests.layered import layered_store


def test_command(tmp_path: Path) -> None:
    """Every layer, the last one too, and every modality; the sampled cosine beside that of all pairs."""
    layers = stream(tmp_path / "store")
    given = [f"--store={layers.store.path}", f"--output={tmp_path / 'out'}", "--baseline_size=30", "--draws=50"]
    main(["anisotropy", *given])
    found = Result.load(tmp_path / "out")
    assert found.settings["baseline_size"] == 30
    assert (tmp_path / "out" / "mean_cosine.png").is_file()
    for modality in ("all", "text", "image"):
        part = layers.of(modality)
        for name, value in (("anisotropy", anisotropy), ("mean cosine", mean_cosine)):
            scores = found.of(name, modality)
            assert [one.layer for one in scores] == [0, 1, 2]
            for one in scores:
                assert one.value == pytest.approx(value(part.values(one.layer)), abs=1e-9)
                assert one.low <= one.value <= one.high
                assert (one.rows, one.samples) == (len(part), 24)
        for one in found.of("mean cosine of 30 rows", modality):
            drawn = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:30]
            assert one.value == pytest.approx(mean_cosine(part.values(one.layer)[drawn]), abs=1e-9)
            assert one.rows == 30
    assert any(
        note.startswith("all: rows that are copies of others (they count), by layer: 0: 23") for note in found.notes
    )


def test_bands_are_those_of_refits(tmp_path: Path) -> None:
    """On drawn samples, within noise; a drawn sample's copies raise the refitted cosine a little."""
    layers = stream(tmp_path)
    scores, _ = analyse(layers, ["all"], Settings(draws=200))
    samples, rows = torch.as_tensor(layers.samples), layers.values(1)
    refitted = of_rows(samples, lambda drawn: [anisotropy(rows[drawn]), mean_cosine(rows[drawn])], draws=200)
    for place, name in enumerate(("anisotropy", "mean cosine")):
        one = next(one for one in scores if one.score == name and one.layer == 1)
        width = float(refitted.high[place] - refitted.low[place])
        assert one.high - one.low == pytest.approx(width, rel=0.3)
        assert one.low == pytest.approx(float(refitted.low[place]), abs=0.3 * width)


def test_processes_find_the_same(tmp_path: Path) -> None:
    """Each a share of the rows: scores, bands and notes are those of one process."""
    layers = stream(tmp_path)
    alone = analyse(layers, ["all", "text"], Settings(draws=20))
    for scores, notes in in_processes(
        lambda process: analyse(layers, ["all", "text"], Settings(draws=20), processes=process)
    ):
        assert notes == alone[1]
        for one, other in zip(scores, alone[0], strict=True):
            assert [one.value, one.low, one.high] == pytest.approx([other.value, other.low, other.high], abs=1e-9)


def test_what_has_no_score_is_noted(tmp_path: Path) -> None:
    """Rows that do not vary, zero rows, fewer rows than the baseline; without draws there are no bands."""
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    rows[4] = 0
    store = layered_store(tmp_path, {0: torch.ones(9, 3), 1: rows}, list(range(9)))
    scores, notes = analyse(Layers.of_store(store), ["all"], Settings(baseline_size=20, draws=0))
    assert {one.layer for one in scores} == {1}
    assert all(math.isnan(one.low) for one in scores)
    assert notes == [
        "all: only 9 rows for a baseline of 20",
        "all, layer 0: 9 rows, 0 of them zero, do not vary, so they have no scores",
        "all, layer 1: 1 rows are zero and have no cosine",
        "all: rows that are copies of others (they count), by layer: 0: 8",
    ]


def test_cosine_of_a_length() -> None:
    """Rows all the same have a mean of length 1; rows that cancel have negative cosines at least -1 / (n - 1)."""
    assert cosine_of_length(1.0, 5) == 1
    assert cosine_of_length(-0.1, 5) == cosine_of_length(0.0, 5) == -1 / 4
