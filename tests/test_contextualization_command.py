"""The command on stores whose words and sentences are planted, and on the small LLaVA."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from analyses.analyse_command import main
from analyses.result import Result
from tests.layered import layered_store

N = 24


def planted(path: Path) -> None:
    """Twenty-four sentences: an opening that is the same in all, two words and three patches.

    At layer 0 words are static; at layer 1 a word is its sentence's vector and nothing else, and so is a patch.
    """
    rng = np.random.default_rng(0)
    words = ["<s>", None, None, None, "red", "snow"] * N
    modality = ["text", "image", "image", "image", "text", "text"] * N
    samples = np.repeat(np.arange(N), 6)
    static = np.tile(rng.standard_normal((6, 40)), (N, 1))
    moved = rng.standard_normal((N, 40))[samples]
    opening = np.arange(6 * N) % 6 == 0
    moved[opening] = static[opening]
    values = {0: torch.tensor(static), 1: torch.tensor(moved), 2: torch.tensor(moved + 0.01 * static)}
    layered_store(path, values, samples.tolist(), modality, words)


def run(tmp_path: Path, layer: int, *more: str) -> Result:
    """The command on the planted store at one layer (drawing many takes seconds)."""
    if not (tmp_path / "store").exists():
        planted(tmp_path / "store")
    out = tmp_path / f"out{layer}"
    given = ["--store", str(tmp_path / "store"), "--output", str(out), "--layers", f"[{layer}]", *more]
    main(["contextualization", *given])
    return Result.load(out)


def lines(tmp_path: Path, layer: int, name: str) -> list[dict[str, str]]:
    """One of its tables."""
    with open(tmp_path / f"out{layer}" / name, newline="") as file:
        return list(csv.DictReader(file))


def test_static_words_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At layer 0, for every modality; notes say what counts."""
    found = run(tmp_path, 0, "--draws", "50")
    for modality in ("all", "text", "image"):
        assert found.of("self-similarity, raw", modality)[0].value == pytest.approx(1, abs=1e-9)
        assert found.of("explained variance, raw", modality)[0].value == pytest.approx(1, abs=1e-9)
    told = capsys.readouterr().out
    assert "text: 23 rows repeat a context and count once" in told
    assert "text: 1 words have too few contexts" in told
    assert "image: 3 words and 24 sentences; baseline of 24 tokens" in told
    words = {(line["modality"], line["word"]): line for line in lines(tmp_path, 0, "words.csv")}
    assert {word for modality, word in words if modality == "text"} == {"red", "snow"}
    assert words["image", "patch 2"]["contexts"] == "24"
    assert float(words["text", "red"]["raw_self_similarity"]) == pytest.approx(1)


def test_words_that_are_all_context_are_found(tmp_path: Path) -> None:
    """At layer 1: no two occurrences are alike, and all tokens of a sentence are."""
    found = run(tmp_path, 1, "--draws", "50")
    for modality in ("all", "text", "image"):
        assert abs(found.of("self-similarity", modality)[0].value) < 0.05
        assert found.of("intra-sentence similarity, raw", modality)[0].value > 0.95
        for name in found.kinds():
            score = found.of(name, modality)[0]
            assert score.low <= score.value <= score.high
    sentences = [line for line in lines(tmp_path, 1, "sentences.csv") if line["modality"] == "image"]
    assert [line["sample"] for line in sentences] == [f"s{number}" for number in range(N)]
    assert {line["tokens"] for line in sentences} == {"3"}


def test_without_bands(tmp_path: Path) -> None:
    """Contexts are told apart at the deepest layer, whichever are shown."""
    found = run(tmp_path, 0, "--draws", "0", "--modalities", "[text]")
    assert {(one.layer, one.modality) for one in found.scores} == {(0, "text")}
    assert all(np.isnan(one.low) for one in found.scores)
    assert found.of("self-similarity")[0].left_out == N - 1


@pytest.mark.slow
def test_the_small_llava_and_random_weights(tmp_path: Path) -> None:
    """Both enter words without context; random weights stir context in at once, training keeps what a word is."""
    data = ["--data", "ScenesDataModule", "--data.size", "40", "--answer", "given", "--modalities", "[text]"]
    found = []
    for name, more in (("trained", []), ("random", ["--model.random_weights", "0"])):
        given = ["--model.id", "small:llava", *more, *data, "--output", str(tmp_path / name)]
        main(["contextualization", *given])
        found.append(Result.load(tmp_path / name))
    for result in found:
        assert result.of("self-similarity, raw")[0].value == pytest.approx(1, abs=1e-6)
    trained, random = (result.of("self-similarity") for result in found)
    assert all(a.low > b.high for a, b in zip(trained[1:], random[1:], strict=True))
