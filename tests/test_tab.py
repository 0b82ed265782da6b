"""Controls take their values and refuse all else; tabs come from installed packages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from hooked_mm.explorer import tab as tab_module
from hooked_mm.explorer.tab import GROUP, LONGEST, Choice, Control, Number, Text, Toggle, View, checked, load_tabs

CONTROLS: list[Control] = [
    Choice("map", "Map", [("Raw", "raw"), ("Two", 2), ("One and a half", 1.5), ("One", 1.0)], "raw"),
    Choice("concept", "Concept", [], changing=True),
    Number("layer", "Layer", 0, 31, 5),
    Number("alpha", "Alpha", -2, 2, 0, step=0.1),
    Toggle("own", "Own"),
    Text("words", "Words"),
]
GOOD: dict[str, Any] = {"map": 2, "concept": None, "layer": 31, "alpha": 0.3, "own": True, "words": "red star"}

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, 2**63, -1, 0, 1, 0.5])
    | st.just(6000).map(lambda digits: 10**digits)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["raw", "2", "1.5", "True", "x" * (LONGEST + 1), "\ud800", "\x00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def test_good_values_are_taken_as_they_are() -> None:
    """Each by its control, in the order of the controls; whole numbers of either kind."""
    assert checked(CONTROLS, dict(reversed(GOOD.items()))) == GOOD
    assert list(checked(CONTROLS, dict(reversed(GOOD.items())))) == [control.name for control in CONTROLS]
    taken = checked(CONTROLS, GOOD | {"layer": 7.0, "alpha": 1})
    assert (taken["layer"], type(taken["layer"])) == (7, int)
    assert (taken["alpha"], type(taken["alpha"])) == (1.0, float)


def test_a_number_that_a_page_sends_back_is_the_option_that_it_was() -> None:
    """A page has one kind of number: of the option 1.0 it sends 1, of the option 2 perhaps 2.0."""
    choice = CONTROLS[0]
    for sent, option in ((1, 1.0), (2.0, 2), (1.5, 1.5)):
        taken = choice.checked(sent)
        assert (taken, type(taken)) == (option, type(option))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("map", "rwa", "no choice for 'Map' 'rwa'; nearest: raw; there are: raw, 2, 1.5, 1.0"),
        ("map", True, "no choice for 'Map' 'True'"),
        ("map", None, "no choice for 'Map' 'None'"),
        ("map", math.nan, "no choice for 'Map'"),
        ("map", ["raw"], "no choice for 'Map'"),
        ("concept", True, "no choice for 'Concept'"),
        ("concept", math.inf, "no choice for 'Concept'"),
        ("concept", "x" * 2001, "no choice for 'Concept'"),
        ("concept", {"a": 1}, "no choice for 'Concept'"),
        ("layer", 32, "Layer: 32 is not between 0 and 31"),
        ("layer", -1, "Layer: -1 is not between 0 and 31"),
        ("layer", 1.5, "Layer: 1.5 is not whole"),
        ("layer", True, "Layer: True is not between"),
        ("layer", "3", "Layer: 3 is not between"),
        ("layer", None, "Layer: None is not between"),
        ("layer", math.nan, "Layer: nan is not between"),
        ("layer", 10**400, "Layer: 1000.* is not between"),
        ("layer", [3], r"Layer: \[3\] is not between"),
        ("alpha", -2.0001, "Alpha: -2.0001 is not between -2 and 2"),
        ("alpha", -math.inf, "Alpha: -inf is not between"),
        ("own", 1, "Own: '1' is neither on nor off"),
        ("own", "true", "Own: 'true' is neither on nor off"),
        ("own", None, "Own: 'None' is neither on nor off"),
        ("words", "x" * (LONGEST + 1), f"Words: a text of at most {LONGEST} characters"),
        ("words", 3, "Words: a text of at most"),
        ("words", None, "Words: a text of at most"),
    ],
)
def test_what_is_no_value_is_refused(name: str, value: Any, reason: str) -> None:
    """With the control's label, the value cut, and what it may be."""
    with pytest.raises(BadInputError, match=reason) as caught:
        checked(CONTROLS, GOOD | {name: value})
    assert len(str(caught.value)) < 300


def test_what_can_not_be_written_is_refused_too() -> None:
    """Numbers of thousands of digits, which Python does not write out, and lists in lists in lists."""
    nested: list = []
    for _ in range(20_000):
        nested = [nested]
    for control in CONTROLS:
        for value, kind in ((10**6000, "int"), (nested, "list")):
            with pytest.raises(BadInputError, match=f"this {kind}|a text of at most"):
                control.checked(value)


@settings(max_examples=25)
@given(control=st.sampled_from(CONTROLS), value=anything)
def test_whatever_comes_is_a_value_or_bad_input(control: Control, value: Any) -> None:
    """Of any JSON either a value that the control may have, or `BadInputError`, and nothing else."""
    try:
        taken = control.checked(value)
    except BadInputError:
        return
    match control:
        case Choice(changing=False):
            assert any(taken is option for _, option in control.options)
        case Choice():
            assert taken is None or isinstance(taken, str | int | float)
        case Number():
            assert control.low <= taken <= control.high
            assert type(taken) is (int if control.step == 1 else float)
        case Toggle():
            assert taken is value
        case Text():
            assert taken is value
            assert len(taken) <= LONGEST


def test_all_controls_have_a_value_and_no_others() -> None:
    """A missing name, an unknown one, none at all."""
    for given_ in ({}, {**GOOD, "more": 1}, {name: GOOD[name] for name in list(GOOD)[1:]}, {**GOOD, 3: 4}):
        with pytest.raises(BadInputError, match="but the controls are"):
            checked(CONTROLS, given_)
    assert checked([], {}) == {}


def test_a_number_between_ends_that_are_not_whole_is_not_whole() -> None:
    """Whole only if step and both ends are."""
    assert Number("x", "X", 0, 2.5, 1).checked(1.5) == 1.5
    assert Number("x", "X", 0.5, 2, 1).checked(1.5) == 1.5


def test_a_view_without_numbers_makes_none() -> None:
    """Its Python is a program that makes the same nothing."""
    names: dict[str, Any] = {}
    exec(View([]).python, names)
    assert names["arrays"] == dict(View([]).arrays) == {}


def made(folders: Sequence[Path]) -> Any:
    """Somebody else's tab."""
    return SimpleNamespace(name="made", title="Made", about="", order=15, folders=list(folders))


def first(folders: Sequence[Path]) -> Any:
    """Another."""
    return SimpleNamespace(name="first", title="First", about="", order=1, folders=list(folders))


def other(folders: Sequence[Path]) -> Any:
    """One that wants to stand where `made` stands; its name comes before."""
    return SimpleNamespace(name="another", title="Other", about="", order=15, folders=list(folders))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three packages have been installed that contribute tabs."""
    entries = [EntryPoint(one.__name__, f"{__name__}:{one.__name__}", GROUP) for one in (made, other, first)]
    monkeypatch.setattr(tab_module, "entry_points", lambda group: entries if group == GROUP else [])


@pytest.mark.usefixtures("installed")
def test_tabs_come_from_entry_points_in_their_order(tmp_path: Path) -> None:
    """Any package's, by their order, then by name; the folders opened for one reach it alone, as paths."""
    found: list[Any] = list(load_tabs({"made": [tmp_path, str(tmp_path)]}))  # type: ignore[list-item]
    assert [tab.name for tab in found] == ["first", "another", "made"]
    assert [tab.folders for tab in found] == [[], [], [tmp_path, tmp_path]]


@pytest.mark.usefixtures("installed")
def test_folders_for_no_tab_are_refused(tmp_path: Path) -> None:
    """The name is wrong, and the near one is named."""
    with pytest.raises(BadInputError, match="no tab 'maid'; nearest: made; there are: made, other, first"):
        load_tabs({"maid": [tmp_path]})
