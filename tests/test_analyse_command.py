"""`hooked-mm analyse` starts at once, and each of its commands is there under its own help."""

from __future__ import annotations

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import analyses.analyse_command as analyse
from analyses.result import Result
from hooked_mm.extract_command import main as extract_main
from tests.pages import DOCS, broken_links, run_page

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


def test_the_page_lists_every_command() -> None:
    """With the file of its formula."""
    rows = re.findall(
        r"^\| `([\w-]+)` \| .* \| .*\.\./analyses/\w+\.py\)", (DOCS / "analyses.md").read_text(), re.MULTILINE
    )
    assert sorted(rows) == sorted(analyse.COMMANDS)


@pytest.mark.slow
@pytest.mark.usefixtures("loaded", "unchecked")
def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands and its Python in their order; what they say they write is there; its links lead somewhere."""
    monkeypatch.chdir(tmp_path)
    names = run_page("analyses.md", extract=extract_main, analyse=analyse.main)
    assert round(names["step"].score, 6) == 0.995649
    for run in ("linearity", "anisotropy", "dimension", "trained", "random", "place", "words"):
        assert Result.load(tmp_path / "runs" / run).scores
    trained, random = (Result.load(tmp_path / "runs" / run) for run in ("trained", "random"))
    assert (trained.model, random.model) == ("trained", "small:llava, random weights")
    pairs = zip(trained.of("anisotropy", "image"), random.of("anisotropy", "image"), strict=True)
    assert all(ours.value > theirs.value for ours, theirs in pairs)
    place = Result.load(tmp_path / "runs" / "place")
    assert all(one.low > 0 for one in place.of("selectivity", "image"))
    assert not broken_links("analyses.md")
