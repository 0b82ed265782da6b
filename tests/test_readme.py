"""The README is true: its Python runs, its commands run, its links and pictures exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hooked_mm.cli import main as program
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.usefixtures("loaded", "unchecked")
def test_the_python_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All blocks in one session, as a reader would; shapes in comments are the real ones; concepts name colours."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    first, second, third, fourth, fifth = blocks("python")
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
    assert names["small"].cfg.family == "gemma3"
    assert names["logits"].shape[0] == len(names["cache"].batch)
    exec(fifth, names)
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


def commands() -> list[str]:
    """The lines that call the program, in order."""
    return [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hooked-mm")]


SHORTER = {
    "hooked-mm demo": "--samples 24 --held_out 20 --n_components 3",
    "hooked-mm learn": "--method.max_iter 20",
    "hooked-mm ground": "--count 3",
    "hooked-mm shift": "--data.size 60 --k [3] --count 2",
    "hooked-mm analyse logit-lens": "--data.size 3",
    "hooked-mm analyse linearity": "--data.size 8 --draws 10",
    "hooked-mm analyse relevancy": "--data.size 1",
    "hooked-mm analyse patching": "--size 2 --draws 10",
}
"""What the quick run of a command has in addition."""
LONG = ("hooked-mm models", "hooked-mm demo --model")
"""Checks of families, and a second demo: tests/test_models.py and tests/test_demo.py have shorter ones."""


@pytest.mark.usefixtures("loaded")
def test_the_program_does_what_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in this process, some with less work, and the files that the next ones read are there."""
    monkeypatch.chdir(tmp_path)
    short = [line for line in commands() if not line.startswith(LONG) or line.endswith("--small")]
    assert {line.split()[1] for line in short} == {line.split()[1] for line in commands()}
    for line in short:
        more = " ".join(shorter for command, shorter in SHORTER.items() if line.startswith(command))
        assert program(shlex.split(f"{line} {more}")[1:]) == 0, line
    boards = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("tensorboard")]
    assert boards
    for line in boards:
        assert list((tmp_path / line.split("--logdir ")[1]).glob("events.out.tfevents*"))


@pytest.mark.slow
@pytest.mark.longest
def test_the_program_runs_as_the_readme_calls_it(tmp_path: Path) -> None:
    """Every command with the README's own arguments, as a program of its own; `make demo` below runs a whole demo."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands():
        fewer = " --samples 60 --held_out 60" if command.startswith("hooked-mm demo") else ""
        done = subprocess.run(
            command + fewer, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"


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
@pytest.mark.longest
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
