"""The command on stores in which labels are planted, and on the small LLaVA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyses.analyse_command import main
from analyses.layers import Layers
from analyses.occurrences import Occurrences
from analyses.probe_command import control_types
from analyses.result import Result
from hooked_mm.errors import BadInputError
from hooked_mm.store import ActivationStore
from tests.layered import layered_store

N = 90


def planted(path: Path) -> None:
    """Ninety samples of two words and two patches: the place is in patches at layer 1, and nowhere at layer 0.

    Words are in text rows at both layers, along axes of their own.
    """
    rng = np.random.default_rng(0)
    words, modality = ["red", "snow", None, None] * N, ["text", "text", "image", "image"] * N
    samples = np.repeat(np.arange(N), 4)
    places = rng.integers(2, size=N)
    values = 0.2 * rng.standard_normal((2, 4 * N, 12))
    values[:, np.arange(4 * N), np.arange(4 * N) % 4] += 1
    image = np.array([kind == "image" for kind in modality])
    values[1, image, 5 + places[samples[image]]] += 1
    columns: list[dict[str, Any]] = [
        {"place": "snow" if one else "sea", "facts": ["place=snow"] if one else []} for one in places
    ]
    held = {layer: torch.tensor(values[layer]) for layer in (0, 1)}
    layered_store(path, held, samples.tolist(), modality, words, columns)


def run(tmp_path: Path, layer: int, *more: str) -> Result:
    """The command at one layer (drawing takes seconds)."""
    if not (tmp_path / "store").exists():
        planted(tmp_path / "store")
    given = ["--store", str(tmp_path / "store"), "--output", str(tmp_path / "out"), "--draws", "50"]
    main(["probe", *given, "--layers", f"[{layer}]", *more])
    return Result.load(tmp_path / "out")


def value(found: Result, score: str, modality: str) -> float:
    """One number."""
    return found.of(score, modality)[0].value


@pytest.mark.parametrize("label", [["--label", "place"], ["--label", "facts", "--fact", "place=snow"]])
def test_a_place_is_read_off_patches(tmp_path: Path, label: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Far above the control, and not off text, where it is not."""
    found = run(tmp_path, 1, *label)
    assert value(found, "accuracy", "image") > 0.95
    assert value(found, "selectivity", "image") > 0.25
    assert value(found, "accuracy", "text") < 0.75
    assert abs(value(found, "selectivity", "text")) < 0.3
    for score in found.scores:
        assert score.low <= score.value <= score.high
        assert score.samples == N / 5
    told = capsys.readouterr().out
    assert "image: 108 rows to fit, 36 to choose the penalty, 36 to score; 2 labels" in told
    assert "image: best on validation at layer 1, where the accuracy is" in told


def test_nothing_is_read_where_nothing_is(tmp_path: Path) -> None:
    """At layer 0, chance."""
    assert value(run(tmp_path, 0, "--label", "place", "--modalities", "[image]"), "accuracy", "image") < 0.75


def test_random_labels_of_words_are_learnt_by_heart(tmp_path: Path) -> None:
    """Words can be told apart, so a probe on words has no selectivity here; image rows have no words, which is said."""
    found = run(tmp_path, 0, "--label", "word", "--modalities", "[text]")
    assert value(found, "accuracy", "text") > 0.95
    assert value(found, "control accuracy", "text") > 0.95
    assert value(found, "accuracy with shuffled labels", "text") < 0.8
    (tmp_path / "out" / "result.json").unlink()
    with pytest.raises(BadInputError, match="training has 0 rows with 0 different labels"):
        run(tmp_path, 0, "--label", "word", "--modalities", "[image]")


def test_control_types(tmp_path: Path) -> None:
    """Words or patches, samples, or a column."""
    planted(tmp_path)
    store = ActivationStore.open(tmp_path)
    layers = Layers.of_store(store)
    words = Occurrences.of(layers).words
    assert control_types(layers, "word", words)[0].tolist() == [0, 1, 2, 3] * N
    assert (control_types(layers, "sample", words)[0] == layers.samples).all()
    by_place, notes = control_types(layers, "place", words)
    places = store.samples.column("place").to_pylist()
    assert [place == places[0] for place in places] == (by_place[::4] == by_place[0]).tolist()
    assert notes == []
    without = control_types(layers, "word", np.full(4 * N, -1))[0]
    assert len(np.unique(without)) == N
    assert "of one type" in control_types(layers, "word", np.zeros(4 * N, dtype=int))[1][0]
    with pytest.raises(BadInputError, match="no type 'plaice'; nearest: place"):
        control_types(layers, "plaice", words)


@pytest.mark.slow
def test_the_colour_in_the_small_llava_and_in_random_weights(tmp_path: Path) -> None:
    """A question's tokens hold the object's colour far above the control, and far more than with random weights.

    Where they enter they hold nothing of the picture.
    """
    found = []
    for name, more in (("trained", []), ("random", ["--model.random_weights", "0"])):
        rows = ["--selector", "EachOf", "--selector.role", "question", "--modalities", "[text]"]
        data = ["--data", "ScenesDataModule", "--data.size", "300", "--data.count", "1", "--label", "colour"]
        main(["probe", "--model.id", "small:llava", *more, *data, *rows, "--output", str(tmp_path / name)])
        found.append(Result.load(tmp_path / name))
    trained, random = found
    assert trained.of("accuracy")[0].value == trained.of("accuracy of the majority label")[0].value
    for layer in range(1, 7):
        best = trained.of("accuracy")[layer]
        assert best.low > max(trained.of("control accuracy")[layer].high, random.of("accuracy")[layer].high)
    assert max(one.value for one in trained.of("selectivity")) > 0.7
