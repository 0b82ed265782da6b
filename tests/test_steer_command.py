"""`hooked-mm steer` starts at once, and hands arguments on to the command that is chosen."""

from __future__ import annotations

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from types import ModuleType

import pytest

import steering.steer_command as steer
from hooked_mm.extract_command import main as extract_main
from steering.sweep_result import SweepResult
from tests.pages import broken_links, run_page

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "lightning", "nnsight", "numpy", "pyarrow", "sklearn")


def test_help_is_quick_and_light() -> None:
    """Within a second of processor time, and nothing heavy is imported."""
    code = (
        "import sys, time; from steering.steer_command import main; main(['--help']); "
        f"print([name for name in {HEAVY} if name in sys.modules], time.process_time() < 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    *lines, last = done.stdout.splitlines()
    assert last == "[] True"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == ["compute", "apply", "evaluate", "sweep"]


@pytest.mark.parametrize("name", steer.COMMANDS)
def test_arguments_are_handed_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind the name goes to the function of its module."""
    module, function, _ = steer.COMMANDS[name]
    given: list[list[str]] = []
    fake = ModuleType(module)
    setattr(fake, function, given.append)
    monkeypatch.setitem(sys.modules, f"steering.{module}", fake)
    steer.main([name, "--store", "x"])
    assert given == [["--store", "x"]]


def test_it_is_a_command_of_the_program() -> None:
    """By the entry point that the package declares."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert "steer = steering.steer_command:main" in config["options.entry_points"]["hooked_mm.commands"].splitlines()


@pytest.mark.slow
@pytest.mark.usefixtures("loaded", "unchecked")
def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands and its Python in their order: what it says happens does; its links lead somewhere."""
    monkeypatch.chdir(tmp_path)
    names = run_page("steering.md", extract=extract_main, steer=steer.main)
    assert names["said"][:2] == ["three", "three"]
    assert names["said"][2:] == [names["scenes"][number].columns["place"] for number in (2, 3)]
    found = SweepResult.load(tmp_path / "runs" / "sweep")
    (chosen,) = [row for row in found.of("test") if row["chosen"]]
    assert chosen["goal_met"]
    assert chosen["gate"] == "gate of one"
    assert {"report.html", "settings.csv", "front.csv", "sweep.json", "tensorboard", "validation", "test"} <= {
        path.name for path in (tmp_path / "runs" / "sweep").iterdir()
    }
    assert (tmp_path / "runs" / "applied" / "answers.csv").is_file()
    assert not broken_links("steering.md")
