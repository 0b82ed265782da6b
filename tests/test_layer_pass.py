"""Passes over layers: every row once, in whatever share; copies counted; samples that have rows."""

from __future__ import annotations

from pathlib import Path

import torch

from analyses.layer_pass import LayerPass, told_copies
from tests.geometry import SAMPLES, in_processes, stream


def test_rows_values_and_copies(tmp_path: Path) -> None:
    """The first row of each sample is the same at layer 0 only."""
    layers = stream(tmp_path)
    one = LayerPass(layers, (0, 1), "all", "cpu", in_processes(lambda process: process, 1)[0])
    seen = []
    for rows, (x, y) in one.chunks(count=True):
        assert torch.equal(x, layers.values(0, rows.numpy()))
        assert torch.equal(y, layers.values(1, rows.numpy()))
        seen += rows.tolist()
    assert seen == list(range(len(layers)))
    assert one.copies == 23
    assert (one.samples, one.width, one.sample.tolist()) == (24, 6, SAMPLES)
    score = one.score("s", 1.0)
    assert (score.layer, score.rows, score.samples) == (0, len(SAMPLES), 24)


def test_processes_count_copies_of_each_others_rows(tmp_path: Path) -> None:
    """Each sees a share; all know the sum."""
    layers = stream(tmp_path)
    small = type(
        "Small", (), {"__getattr__": lambda self, name: getattr(layers, name), "__len__": lambda self: len(layers)}
    )
    small.batches = lambda self, *given, **named: layers.batches(*given, size=7, **named)

    def count(process):
        one = LayerPass(small(), (0,), "all", "cpu", process)
        mine = sum(len(rows) for rows, _ in one.chunks(count=True))
        return one.copies, mine

    found = in_processes(count, 3)
    assert {copies for copies, _ in found} == {23}
    assert sum(mine for _, mine in found) == len(layers)
    assert min(mine for _, mine in found) > 20


def test_samples_without_rows_do_not_count(tmp_path: Path) -> None:
    """Of a part of the store."""
    layers = stream(tmp_path)
    part = type(layers)(layers.store.where(sample=["s3", "s9"]), layers.hooks)
    one = LayerPass(part, (0,), "all", "cpu", in_processes(lambda process: process, 1)[0])
    assert one.samples == 2
    assert set(one.sample.tolist()) == {0, 1}


def test_copies_are_told() -> None:
    """By layer, where there are any."""
    assert told_copies("text", {2: 0, 0: 5}, "kept") == "text: rows that are copies of others (kept), by layer: 0: 5"
    assert told_copies("all", {0: 0}, "kept").endswith("none")
