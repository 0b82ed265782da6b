"""`hooked-mm explore`: what it takes, what it refuses, and how soon it says so."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hooked_mm.cli import main as program
from hooked_mm.errors import BadInputError
from hooked_mm.explorer import explore_command
from hooked_mm.explorer.conversation import ModelName
from hooked_mm.explorer.explore_command import PASSWORD, build_parser, folders_of, main, names_of, single


def taken(*arguments: str) -> Any:
    """What the command makes of its arguments."""
    return build_parser().parse_args(single(arguments))


@pytest.mark.parametrize(
    ("arguments", "small", "opened"),
    [
        ([], [], []),
        (["--small", "llava"], ["llava"], []),
        (["--small=llava"], ["llava"], []),
        (["--small", "[llava, qwen2_vl]"], ["llava", "qwen2_vl"], []),
        (["--small=[llava,qwen2_vl]"], ["llava", "qwen2_vl"], []),
        (["--small", "llava", "--small", "qwen2_vl"], ["llava", "qwen2_vl"], []),
        (["--small", "[llava, molmo]", "--port", "7", "--small=qwen2_vl"], ["llava", "molmo", "qwen2_vl"], []),
        (["--open", "a=/x", "--open", "b=/y z, 1: #q"], [], ["a=/x", "b=/y z, 1: #q"]),
        (["--open", "[a=/x, b=/y]"], [], ["a=/x", "b=/y"]),
    ],
)
def test_one_name_is_a_list_of_one(arguments: list[str], small: list[str], opened: list[str]) -> None:
    """Given once, several times or as a list: none replaces another, and a folder may be called anything."""
    made = taken(*arguments)
    assert (made.small, made.open) == (small, opened)


def test_by_default_only_this_machine_is_served() -> None:
    """At 127.0.0.1, without a password, open to nobody else."""
    made = taken()
    assert (made.host, made.port, made.password, made.open_to_all) == ("127.0.0.1", None, None, False)


def test_an_option_without_its_value_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The next option is not taken for it."""
    for arguments in (["--small"], ["--small", "--port", "7"]):
        with pytest.raises(SystemExit) as caught:
            taken(*arguments)
        assert caught.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_models_are_named_in_their_order() -> None:
    """Those from the hub with all that they are loaded with; the small LLaVA unless any was given."""
    assert names_of(taken()) == [ModelName("small", "llava")]
    made = taken("--small", "molmo", "--model", "a/b", "--model", "c/d", "--dtype", "bfloat16", "--device_map", "auto")
    options = (("dtype", "bfloat16"), ("device_map", "auto"))
    assert names_of(made) == [
        ModelName("id", "a/b", options),
        ModelName("id", "c/d", options),
        ModelName("small", "molmo"),
    ]
    assert names_of(taken("--model", "a/b", "--revision", "main")) == [ModelName("id", "a/b", (("revision", "main"),))]


def test_folders_are_opened_for_tabs(tmp_path: Path) -> None:
    """By the tab's name, several for one; an equals sign in a folder's name is the folder's."""
    odd = tmp_path / "a=b, c"
    odd.mkdir()
    assert folders_of([f"concepts={tmp_path}", f"steering={odd}", f"concepts={odd}"]) == {
        "concepts": [tmp_path, odd],
        "steering": [odd],
    }
    assert folders_of([]) == {}


@pytest.mark.parametrize(
    ("opened", "reason"),
    [
        ("concepts", "names no tab and folder; write TAB=FOLDER"),
        ("concepts=/gone/for/good", "there is no folder '/gone/for/good'"),
        ("concepts=", "names no tab and folder"),
        (f"concepts={__file__}", "there is no folder"),
        ("=/tmp", "names no tab and folder"),
    ],
)
def test_folders_that_are_none_are_refused(opened: str, reason: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(BadInputError, match=f"--open .*{reason}"):
        folders_of([opened])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_others_are_not_let_in_by_mistake(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program ends before a model is loaded, and says what to give."""
    monkeypatch.delenv(PASSWORD, raising=False)
    monkeypatch.setattr(ModelName, "load", lambda name: pytest.fail("a model was loaded"))
    assert program(["explore", "--host", host]) == 2
    assert program(["explore", "--host", host, "--password", ""]) == 2
    assert "give --password, or --open_to_all true" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, no traceback."""
    monkeypatch.setattr(explore_command, "find_spec", lambda name: None)
    assert program(["explore"]) == 2
    assert capsys.readouterr().err == "hooked-mm explore: the explorer needs Gradio: pip install 'hooked-mm[app]'\n"


@pytest.mark.parametrize(
    ("arguments", "variable", "password"),
    [
        (["--password", "given"], None, "given"),
        ([], "from the variable", "from the variable"),
        (["--password", "given"], "from the variable", "given"),
        (["--open_to_all", "true"], None, None),
    ],
)
def test_the_page_is_served_until_it_is_interrupted(
    arguments: list[str],
    variable: str | None,
    password: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the models, host, port and password that were given; Ctrl-C closes it, whatever is open."""
    pytest.importorskip("gradio")
    from hooked_mm.explorer import desk, serving, web_page

    told: list[Any] = []

    @contextmanager
    def served(page: Any, host: str, port: int | None, password: str | None, css: str, open_to_all: bool) -> Any:
        told.extend([page.names, host, port, password, open_to_all])
        try:
            yield "http://somewhere"
        finally:
            told.append("closed")

    def interrupt() -> Any:
        raise KeyboardInterrupt

    made = SimpleNamespace(warm=lambda: told.append("warm"), close=lambda: None)
    monkeypatch.setattr(desk, "Desk", lambda names, tabs: told.append(names) or made)
    monkeypatch.setattr(web_page, "Page", lambda given: SimpleNamespace(names=given))
    monkeypatch.setattr(serving, "served", served)
    monkeypatch.setattr(explore_command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(explore_command.threading, "Event", lambda: SimpleNamespace(wait=interrupt))
    monkeypatch.delenv(PASSWORD, raising=False)
    if variable is not None:
        monkeypatch.setenv(PASSWORD, variable)
    with pytest.raises(KeyboardInterrupt):
        main(["--small", "qwen2_vl", "--host", "0.0.0.0", "--port", "81", *arguments])
    assert told == [
        [ModelName("small", "qwen2_vl")],
        "warm",
        made,
        "0.0.0.0",
        81,
        password,
        "--open_to_all" in arguments,
        "closed",
    ]
    said = capsys.readouterr().out
    assert "the explorer is at http://somewhere" in said
    assert password is None or password not in said


def test_help_is_shown_at_once() -> None:
    """Neither torch nor Gradio is imported for it; it names every option and the program."""
    code = (
        "import sys\nfrom hooked_mm.cli import main\n"
        "try:\n    main(['explore', '--help'])\n"
        "finally:\n    print([name for name in ('torch', 'gradio', 'transformers', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"
    for word in ("hooked-mm explore", "--model", "--small", "--open", "--host", "--password", "--open_to_all"):
        assert word in done.stdout
