"""`hooked-mm extract`: options and YAML make the run they describe; what is wrong is said in one line."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hooked_mm.cli import main as program
from hooked_mm.extract_command import build_parser, main
from hooked_mm.selectors import Selector
from hooked_mm.store import ActivationStore

OPTIONS = [
    *("--model.id", "small:llava", "--model.dtype", "float32"),
    *("--data", "ScenesDataModule", "--data.size", "5", "--data.batch_size", "2"),
    *("--hooks", "blocks.*.hook_resid_post", "--answer", "given", "--trainer.accelerator", "cpu"),
]
SELECTOR = ["--selector", "TokenOfInterest", "--selector.words", "[red, blue, sea, snow, city, desert, beach, forest]"]


def test_options_make_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every hook that the glob matches, rows of the words, how it was made, scalars beside the shards; then resumed."""
    main([*OPTIONS, *SELECTOR, "--output", str(tmp_path / "s")])
    store = ActivationStore.open(tmp_path / "s")
    assert store.hooks == [f"blocks.{layer}.hook_resid_post" for layer in range(6)]
    assert store.samples.num_rows == 5
    assert set(store.rows.column("word").to_pylist()) <= {
        "red",
        "blue",
        "sea",
        "snow",
        "city",
        "desert",
        "beach",
        "forest",
    }
    assert store.made_by["data"]["samples"] == 5
    assert f"{len(store)} rows of 5 samples" in capsys.readouterr().out
    assert list((tmp_path / "s" / "log").glob("events*"))


@pytest.mark.usefixtures("loaded")
def test_yaml_and_several_selectors(tmp_path: Path) -> None:
    """A file says the same as options; selectors have names there."""
    (tmp_path / "extract.yaml").write_text(
        "selector:\n  end: {class_path: LastPrompt}\n  picture: {class_path: MeanOver, init_args: {modality: image}}\n"
    )
    chosen = build_parser().parse_args(["-c", str(tmp_path / "extract.yaml"), *OPTIONS, "--output", "x"])
    assert sorted(chosen.selector) == ["end", "picture"]
    main(["-c", str(tmp_path / "extract.yaml"), *OPTIONS, "--output", str(tmp_path / "s")])
    assert set(ActivationStore.open(tmp_path / "s").rows.column("selector").to_pylist()) == {"end", "picture"}


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A data set that refuses its options is heard, not buried under types."""
    wrong = [*OPTIONS, *SELECTOR, "--output", str(tmp_path / "s"), "--data.split", "tests"]
    with pytest.raises(SystemExit):
        program(["extract", *wrong])
    assert "tests" in capsys.readouterr().err
    assert program(["extract", *OPTIONS, *SELECTOR, "--output", str(tmp_path / "s"), "--data.size", "-1"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("hooked-mm extract: size=-1")
    assert not (tmp_path / "s").exists()


PAGE = (Path(__file__).parents[1] / "docs" / "extraction.md").read_text()


@pytest.mark.usefixtures("unchecked")
def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its YAML, commands and Python."""
    monkeypatch.chdir(tmp_path)
    ((yaml,), (commands,), (python,)) = (
        re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) for language in ("yaml", "bash", "python")
    )
    (tmp_path / "extract.yaml").write_text(yaml)
    for command in commands.splitlines():
        assert program(shlex.split(command)[1:]) in (0, None)
    names: dict[str, Any] = {}
    exec(python, names)
    assert len(names["values"]) == len(names["texts"]) > 0
    assert all("red" in text.split() for text in names["texts"])


def test_the_page_lists_every_selector_and_setting() -> None:
    """A row per selector, all its settings in it; every answer; every command for stores."""
    rows = {row.split("|")[1].strip(" `"): row for row in PAGE.splitlines() if row.startswith("| `")}
    for kind in Selector.__subclasses__():
        if kind.__module__ == Selector.__module__:
            settings = [field.name for field in fields(kind)]  # type: ignore[arg-type]
            assert [name for name in settings if f"`{name}`" not in rows[kind.__name__]] == [], kind
    assert {"none", "given", "generated", "stored"} <= rows.keys()
