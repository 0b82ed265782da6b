"""What analyses share: rows of a store or of a model and data, resumed where they were cut off, by modality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from analyses.frame import add_layers, add_rows, by_modality, called, everywhere, finish, new_parser, opened, parsed
from analyses.layers import Layers
from analyses.result import Result, Score
from hooked_mm.errors import BadInputError, StoreError
from hooked_mm.hooked import HookedMM
from tests.layered import layered_store

DATA = ["--data", "ScenesDataModule", "--data.size", "3"]


def options(*arguments: Any) -> Any:
    """Parsed as a command parses them."""
    parser = new_parser("test", "A test.")
    add_rows(parser)
    add_layers(parser)
    return parsed(parser, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("loaded")
def test_rows_are_extracted_once(llava: HookedMM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every position at every layer, each with its token; a second run needs --resume, and reads them again."""
    given = ("--model.id", "small:llava", *DATA, "--output", tmp_path / "out")
    made = options(*given)
    store = opened(made)
    layers = Layers.of_store(store)
    assert layers.numbers == list(range(llava.cfg.n_layers + 1))
    assert {len(layers.of("image")) // 64, len(set(layers.samples))} == {3}
    assert None not in layers.of("text").words
    assert called(made, store) == "small:llava"
    assert called(options(*given, "--name", "mine"), store) == "mine"
    with pytest.raises(StoreError, match="already holds a store"):
        opened(options(*given))
    again = opened(options(*given, "--resume"))
    assert len(again) == len(store)
    assert "rows of 3 samples" in capsys.readouterr().out
    part = opened(options("--store", tmp_path / "out" / "store", "--where", "{modality: image}", "--output", tmp_path))
    assert len(part) == 3 * 64
    assert called(options("--store", tmp_path / "out" / "store", "--output", tmp_path), part) == "llava"


@pytest.mark.parametrize(
    "given", [(), ("--store", "x", "--model.id", "y", *DATA), ("--model.id", "y"), tuple(DATA), ("--store", "x", *DATA)]
)
def test_rows_come_from_one_place(tmp_path: Path, given: tuple[str, ...]) -> None:
    """A store, or a model with data."""
    with pytest.raises(BadInputError, match=r"give --store, or --model\.id and --data"):
        opened(options(*given, "--output", tmp_path))


def test_a_result_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with one is refused before anything runs."""
    finish(Result("test", "m", [Score("s", "all", 0, 1.0)]), tmp_path / "out")
    assert "s\nlayer  all\n0        1\n" in capsys.readouterr().out
    with pytest.raises(BadInputError, match="already holds a result"):
        options("--store", "x", "--output", tmp_path / "out")


def test_modalities_without_rows_are_noted(tmp_path: Path) -> None:
    """Named in the notes; only if none is left that is an error."""
    layers = Layers.of_store(layered_store(tmp_path, {0: torch.ones(3, 2)}, [0, 1, 1]))
    seen: dict[str, int] = {}
    notes: list[str] = []
    by_modality(layers, ["all", "text", "image"], lambda part, name: seen.update({name: len(part)}), notes)
    assert seen == {"all": 3, "text": 3}
    assert notes == ["there are no rows of modality image"]
    with pytest.raises(BadInputError, match="has no rows of image, audio"):
        by_modality(layers, ["image", "audio"], lambda *_: None, [])


def test_something_done_everywhere() -> None:
    """Its result comes back as it is; on which device it runs it is told."""
    assert everywhere({}, lambda device: (str(device), torch.ones(2)))[0] == "cpu"
    result = Result("test", "m", [Score("s", "all", 0, 1.0)])
    assert everywhere({}, lambda _: result) is result
