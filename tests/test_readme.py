"""The README is true: its Python runs, its commands run, its links and pictures exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All blocks in one session, as a reader would; shapes in comments are the real ones; concepts name colours."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    first, second, third, fourth = blocks("python")
    assert shapes_are_true(first, names) == 2
    said = re.search(r"\['(.*)'\] instead of \['(.*)'\]", capsys.readouterr().out)
    assert said is not None
    assert said[2] == names["scene"].columns["place"] != said[1]
    exec(second, names)
    words = set(re.findall(r"^\['(\w+)'", capsys.readouterr().out, re.MULTILINE))
    colours = {"red", "green", "blue", "yellow", "purple", "orange", "white", "black"}
    assert len(words & colours) >= 5
    assert shapes_are_true(third, names) == 1
    assert names["steered"] != names["said"]
    exec(fourth, names)
    data = SceneDataset(100, count=1)
    red = next(s for s in (data[n] for n in range(100)) if s.columns["colour"] == ["red"])
    asked = red.images, "what colour is the object ?".replace("object", red.columns["shape"][0])
    told = [model.generate(model.prepare(*asked), 2).text for model in (HookedMM.small("llava"), names["sibling"])]
    assert told == [["red"], ["blue"]]


def shapes_are_true(block: str, names: dict) -> int:
    """Run a block and compare every shape that a comment states; how many there were."""
    exec(block, names)
    shown = [line.split("#") for line in block.splitlines() if ".shape" in line]
    for expression, comment in shown:
        shape = eval(expression.strip(), names)
        numbers = [int(number) for number in re.findall(r"\d+", comment)]
        assert [shape[0], shape[-1]] == [numbers[0], numbers[-1]]
    return len(shown)


LONG = ("hooked-mm models", "hooked-mm demo --model")
"""Checks of all families, and a second demo."""


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_program_runs_as_the_readme_calls_it(long: bool, tmp_path: Path) -> None:
    """Every command with the README's own arguments; the demo writes what the next command reads."""
    every = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hooked-mm")]
    commands = [line for line in every if line.startswith(LONG) == long]
    assert commands
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands:
        done = subprocess.run(
            f"{command} --samples 60 --held_out 60" if command.startswith("hooked-mm demo") else command,
            shell=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    if long:
        return
    boards = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("tensorboard")]
    for line in boards:
        assert list((tmp_path / line.split("--logdir ")[1]).glob("events.out.tfevents*"))


def test_make_knows_the_targets() -> None:
    """Every `make TARGET` of the README is one."""
    targets = [line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make ")]
    assert targets[:2] == ["demo", "test"]
    for target in targets:
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_links_and_pictures_exist() -> None:
    """Every relative link leads somewhere."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs the git repository")
def test_make_demo_in_a_fresh_clone(tmp_path: Path) -> None:
    """As a newcomer: clone, `make demo`, and the table is there; nothing else typed, no environment inherited."""
    clone = tmp_path / "hooked-mm"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    clean = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS")}
    clean["PATH"] = ":".join(p for p in clean["PATH"].split(":") if not p.startswith(str(ROOT)))
    done = subprocess.run(["make", "demo"], cwd=clone, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out AUROC" in done.stdout
    assert (clone / "runs" / "demo" / "report.html").is_file()
