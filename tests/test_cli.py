"""The program starts at once, lists what is installed and turns bad input into exit status 2."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints, version
from pathlib import Path

import pytest

import hooked_mm.cli as cli
from hooked_mm.errors import BadInputError, UnknownHookError

HEAVY = ("torch", "transformers", "lightning", "nnsight", "numpy", "pyarrow", "sklearn")


def install(monkeypatch: pytest.MonkeyPatch, **targets: str) -> None:
    """Pretend that packages with these commands are installed."""
    found = EntryPoints(EntryPoint(name, target, cli.GROUP) for name, target in targets.items())
    monkeypatch.setattr(cli, "entry_points", lambda group: found.select(group=group))


@pytest.fixture
def third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Somebody else's package with a command, its module not yet imported."""
    name = f"third_{tmp_path.name}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "command.py").write_text(
        '"""Count the cats in a store.\n\nAnd more."""\nRAN = []\ndef main(argv):\n    RAN.append(argv)\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}.command"


def test_help_is_quick_and_light() -> None:
    """`--help` lists the demo within three seconds of processor time, and imports nothing heavy."""
    code = (
        "import sys, time; from hooked_mm.cli import main; status = main(['--help']); "
        f"print([name for name in {HEAVY} if name in sys.modules], status, time.process_time() < 3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert last == "[] 0 True"
    (demo,) = [line for line in lines if line.split()[:1] == ["demo"]]
    assert len(demo.split()) > 3


def test_the_installed_program() -> None:
    """The console script is there, and its exit status is the function's."""
    program = str(Path(sys.executable).parent / "hooked-mm")
    helped = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    assert helped.returncode == 0
    assert helped.stdout.startswith("usage: hooked-mm COMMAND")
    assert subprocess.run([program, "demon"], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_every_way_to_ask_for_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without arguments, too."""
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{cli.usage()}\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The installed version."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["hooked-mm", version("hooked-mm")]


def test_unknown_commands_offer_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, the near name, and nothing on standard output."""
    assert cli.main(["dmeo"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "'dmeo'" in err
    assert "nearest: demo" in err


def test_a_third_party_command_is_listed_and_run(
    third: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stands in the list with its first line, without being imported; run, it gets the arguments behind its name."""
    install(monkeypatch, cats=f"{third}:main")
    assert cli.main([]) == 0
    assert "  cats  Count the cats in a store.\n" in capsys.readouterr().out
    assert third not in sys.modules
    assert cli.main(["cats", "--store", "x"]) == 0
    assert sys.modules[third].RAN == [["--store", "x"]]


@pytest.mark.parametrize("target", ["no_such_module:main", "no_such_package.command:main", "hooked_mm.no_such:main"])
def test_a_broken_third_party_command_does_not_take_help_away(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command whose package is gone is listed as such, beside the others."""
    install(monkeypatch, broken=target, demo="concept_dict.demo:main")
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "not installed" in out
    assert "demo" in out


def boom(argv: list[str]) -> None:
    """A command that ends as its first argument says."""
    errors: dict[str, BaseException] = {
        "input": BadInputError("the picture is upside down; turn it", 3),
        "hook": UnknownHookError("no hook 'x'; nearest: y"),
        "stop": KeyboardInterrupt(),
        "bug": ZeroDivisionError("a bug"),
        "exit": SystemExit(7),
    }
    raise errors[argv[0]]


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("input", 2, "hooked-mm boom: sample 3: the picture is upside down; turn it"),
        ("hook", 2, "hooked-mm boom: no hook 'x'; nearest: y\n"),
        ("stop", 130, "interrupted"),
    ],
)
def test_bad_input_and_interruption(
    how: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our errors become a line on standard error and a status, without a traceback."""
    install(monkeypatch, boom=f"{__name__}:boom")
    assert cli.main(["boom", how]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("how", "error"), [("bug", ZeroDivisionError), ("exit", SystemExit)])
def test_other_errors_are_not_hidden(how: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug keeps its traceback, and a command's own exit its status."""
    install(monkeypatch, boom=f"{__name__}:boom")
    with pytest.raises(error):
        cli.main(["boom", how])
