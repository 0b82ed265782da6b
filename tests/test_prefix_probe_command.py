"""The command on a store whose rows remember what was planted, and on the small LLaVA."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from analyses.analyse_command import main
from analyses.result import Result
from hooked_mm.errors import BadInputError
from tests.layered import layered_store

N, WORDS = 160, 4
FAST = ["--probe.width", "16", "--probe.depth", "1", "--probe.hidden", "24", "--probe.epochs", "4", "--draws", "20"]


def planted(path: Path, tokens: bool = True) -> None:
    """An opening, two patches, two words; only at layer 2 does the second word's row hold the first word."""
    rng = np.random.default_rng(0)
    said = rng.integers(WORDS, size=(N, 2))
    words = [word for one, two in said for word in ("<s>", None, None, f"w{one}", f"w{two}")]
    modality = ["text", "image", "image", "text", "text"] * N
    values = 0.05 * rng.standard_normal((3, 5 * N, 2 * WORDS))
    values[:, ::5] = 1.0
    for place in (3, 4):
        values[:, np.arange(N) * 5 + place, said[:, place - 3]] += 1
    values[2, np.arange(N) * 5 + 4, WORDS + said[:, 0]] += 1
    held = {layer: torch.tensor(values[layer]).float() for layer in range(3)}
    layered_store(path, held, np.repeat(np.arange(N), 5).tolist(), modality, words if tokens else None)


def test_what_is_planted_is_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The word before at layer 2 and not at layer 0; rows with nothing to remember are left out and counted."""
    planted(tmp_path / "store")
    more = ["--modalities", "[text]", "--layers", "[0, 2]", "--probe.learning_rate", "0.02", "--rows", "180"]
    main(["prefix-probe", "--store", str(tmp_path / "store"), "--output", str(tmp_path / "out"), *FAST, *more])
    found = Result.load(tmp_path / "out")
    mixed, blank, full = found.of("information about the prefix", "text")
    assert (mixed.layer, blank.layer, full.layer) == (None, 0, 2)
    assert full.low > blank.high
    assert mixed.value > blank.value
    other = found.of("prefix loss given another's representation", "text")[2]
    assert other.value > found.of("prefix loss", "text")[2].value + 0.25
    assert {one.samples for one in found.scores} == {N / 5}
    told = capsys.readouterr().out
    assert "320 image rows have the same text before them all" in told
    assert f"{N} of {5 * N} rows repeat a context or have no token before them" in told
    with open(tmp_path / "out" / "tokens.csv", newline="") as file:
        table = {line["token"]: line for line in csv.DictReader(file)}
    assert {f"w{number}" for number in range(WORDS)} == set(table)
    assert sum(int(line["rows"]) for line in table.values()) == 2 * N / 5


def test_rows_without_tokens_are_refused(tmp_path: Path) -> None:
    """With how to extract others."""
    planted(tmp_path / "store", tokens=False)
    with pytest.raises(BadInputError, match=r"0 rows have tokens.*--selector\.tokens true"):
        main(["prefix-probe", "--store", str(tmp_path / "store"), "--output", str(tmp_path / "out"), *FAST])


@pytest.mark.slow
def test_the_small_llava_remembers_more_than_its_embeddings(tmp_path: Path) -> None:
    """A word's embedding tells something of what stood before it (which word it is), a layer more."""
    data = ["--data", "ScenesDataModule", "--data.size", "120", "--data.style", "full", "--answer", "given"]
    given = ["--longest", "16", "--probe.epochs", "4", "--modalities", "[text]", "--layers", "[0, 3]"]
    main(["prefix-probe", "--model.id", "small:llava", *data, *given, "--output", str(tmp_path / "out")])
    found = Result.load(tmp_path / "out").of("information about the prefix", "text")
    assert found[2].low > found[1].high
    assert found[1].low > 0
