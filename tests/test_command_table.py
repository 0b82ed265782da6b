"""A table of commands: help in every way of asking, arguments handed on, unknown words answered with the nearest."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hooked_mm.command_table import CommandTable
from hooked_mm.errors import BadInputError

ROWS = {"one": ("first_module", "main", "does this"), "other": ("second_module", "other_main", "does that")}


def table(given: list[Any]) -> CommandTable:
    """Its modules note that they were imported, their functions what they were given."""

    def module(name: str) -> ModuleType:
        given.append(name)
        return SimpleNamespace(main=given.append, other_main=lambda rest: given.append(("other", rest)))  # type: ignore[return-value]

    return CommandTable("try", "Try things.", ROWS, module)


@pytest.mark.parametrize("arguments", [None, [], ["-h"], ["--help"], ["help"]])
def test_every_way_to_ask_for_help(arguments: list[str] | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Without arguments, too; nothing is imported for it."""
    given: list[Any] = []
    table(given).run(arguments)
    told = capsys.readouterr().out
    assert "usage: hooked-mm try COMMAND" in told
    assert "  one    does this\n  other  does that\n" in told
    assert not given


def test_arguments_are_handed_on() -> None:
    """Only the module of the command that is chosen is imported, and its own function is called."""
    given: list[Any] = []
    table(given).run(["other", "--store", "--help"])
    assert given == ["second_module", ("other", ["--store", "--help"])]


def test_unknown_words_offer_the_nearest() -> None:
    """The program makes exit status 2 of it."""
    with pytest.raises(BadInputError, match="no command of try 'othre'; nearest: other, one; there are: one, other"):
        table([]).run(["othre"])
