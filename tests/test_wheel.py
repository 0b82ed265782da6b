"""The package works installed: a wheel in an empty environment elsewhere runs the demo on the shipped weights."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from analyses.lens_page import SCRIPTS
from hooked_mm.small import SMALL_MODELS, adapters_of, small_model_path

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the repository as it stands."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_what_it_needs(wheel: Path) -> None:
    """All four packages, weights, processor, card, page template; no tests, no benchmarks."""
    names = zipfile.ZipFile(wheel).namelist()
    model = ("model.safetensors", "tokenizer.json", "config.json", "README.md", "accuracy.json", "probes.md")
    adapter = ("adapter_model.safetensors", "adapter_config.json", "README.md", "accuracy.json")
    for needed in (
        *(f"hooked_mm/small/{name}/{file}" for name in SMALL_MODELS for file in model),
        *(
            f"hooked_mm/small/{name}/adapters/{sibling}/{file}"
            for name in SMALL_MODELS
            for sibling in adapters_of(small_model_path(name))
            for file in adapter
        ),
        *(f"concept_dict/templates/{page}.html" for page in ("base", "parts", "report", "shift")),
        *(f"analyses/templates/{page}.html" for page in ("lens", "lens_index", "lens_style")),
        *(f"analyses/templates/{part}" for part in SCRIPTS),
        "analyses/__init__.py",
        "steering/__init__.py",
        "hooked_mm/py.typed",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]
    assert wheel.stat().st_size < 15 * 2**20


@pytest.mark.slow
@pytest.mark.longest
def test_the_demo_runs_from_a_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Nothing of the repository is in reach: another folder, another environment, no inherited paths."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS")}
    pip = [str(home / "bin" / "pip"), "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(wheel)]
    done = subprocess.run(pip, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program = [str(home / "bin" / "hooked-mm"), "demo", "--samples", "100", "--held_out", "80", "--output", "out"]
    done = subprocess.run(program, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "held-out AUROC" in done.stdout
    where = subprocess.run(
        [str(home / "bin" / "python"), "-c", "import hooked_mm; print(hooked_mm.__file__)"],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(home) in where.stdout
