"""`hooked-mm analyse` starts at once, and each of its commands is there under its own help."""

from __future__ import annotations

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import analyses.analyse_command as analyse

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "lightning", "nnsight", "numpy", "pyarrow", "sklearn")


def test_help_is_quick_and_light() -> None:
    """Nothing heavy is imported."""
    code = (
        "import sys; from analyses.analyse_command import main; main(['--help']); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    *lines, last = done.stdout.splitlines()
    assert last == "[]"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(analyse.COMMANDS)


@pytest.mark.parametrize("name", analyse.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its module and function are there, and its help says where results go."""
    with pytest.raises(SystemExit):
        analyse.main([name, "--help"])
    told = capsys.readouterr().out
    assert told.startswith(f"usage: hooked-mm analyse {name}")
    assert "--output" in told


def test_it_is_a_command_of_the_program() -> None:
    """By the entry point that the package declares."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    entries = config["options.entry_points"]["hooked_mm.commands"].splitlines()
    assert "analyse = analyses.analyse_command:main" in entries
