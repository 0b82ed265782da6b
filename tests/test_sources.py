"""Source code, and none where there is none."""

from __future__ import annotations

import ast

from hooked_mm.sources import source_of


class Inside:
    """A class with a method, which stands away from the margin."""

    def method(self) -> int:
        """Two lines."""
        return 1


def test_a_method_can_be_parsed_by_itself() -> None:
    """It begins at the margin."""
    assert isinstance(ast.parse(source_of(Inside.method)).body[0], ast.FunctionDef)
    assert "return 1" in source_of(Inside)


def test_what_was_typed_in_or_compiled_has_none() -> None:
    """No exception: rules that look at source say nothing then."""
    names: dict = {}
    exec("def typed(): return 1", names)
    assert source_of(names["typed"]) == ""
    assert source_of(len) == ""
    assert source_of(3) == ""
