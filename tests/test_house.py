"""The dependency rule: no import points up or sideways other than DESIGN's table says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# package -> packages of ours that it may import, besides itself
ALLOWED = {
    "hooked_mm": set(),
    "concept_dict": {"hooked_mm"},
    "analyses": {"hooked_mm"},
    "steering": {"hooked_mm", "concept_dict"},
}


def imported(source: str) -> set[str]:
    """Top-level packages that a module's text imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("(relative)" if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0]
            text = first.values[0] if isinstance(first, ast.JoinedStr) else first
            assert isinstance(text, ast.Constant), "an import by a computed name can't be checked"
            found.add(str(text.value).split(".")[0])
    return found


def wrong_imports(package: str, source: str) -> set[str]:
    """Packages of ours that a module of `package` must not import but does."""
    return imported(source) & (set(ALLOWED) - ALLOWED[package] - {package} | {"(relative)", "tests", "benchmarks"})


@pytest.mark.parametrize("package", ALLOWED)
def test_no_import_points_up_or_sideways(package: str) -> None:
    """Every module of every package keeps to its floor."""
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules, f"{package} has no modules"
    wrong = {str(m.relative_to(ROOT)): found for m in modules if (found := wrong_imports(package, m.read_text()))}
    assert not wrong


@pytest.mark.parametrize(
    ("package", "source", "found"),
    [
        ("hooked_mm", "from concept_dict.kmeans import KMeans", {"concept_dict"}),
        ("analyses", "def f():\n    import concept_dict.cards", {"concept_dict"}),
        ("concept_dict", "from importlib import import_module\nimport_module('steering.x')", {"steering"}),
        ("hooked_mm", "from . import batch", {"(relative)"}),
        ("steering", "import hooked_mm, concept_dict, torch", set()),
    ],
)
def test_the_rule_sees_a_wrong_import(package: str, source: str, found: set[str]) -> None:
    """The check itself catches what it is for."""
    assert wrong_imports(package, source) == found


def test_there_is_a_test_file_for_every_module() -> None:
    """One concept, one file, one test file of the same name."""
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    modules = [path for package in ALLOWED for path in (ROOT / package).rglob("*.py") if path.stem != "__init__"]
    assert not [str(path.relative_to(ROOT)) for path in modules if f"test_{path.stem}" not in tests]
