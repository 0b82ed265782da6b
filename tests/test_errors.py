"""Errors can be caught as ours or as the builtin they refine, and read well."""

from __future__ import annotations

import pickle
from difflib import SequenceMatcher

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.errors import (
    BadInputError,
    HookedMMError,
    StoreError,
    UnknownHookError,
    UnknownWordError,
    UnsupportedModelError,
    nearest,
    shown,
    unknown,
)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (UnknownHookError, KeyError),
        (UnsupportedModelError, NotImplementedError),
        (BadInputError, ValueError),
        (UnknownWordError, ValueError),
        (StoreError, ValueError),
    ],
)
def test_errors_are_ours_and_builtin(error: type[Exception], builtin: type[Exception]) -> None:
    """`except HookedMMError` catches all of them, `except KeyError` and the like still work."""
    assert issubclass(error, HookedMMError)
    assert issubclass(error, builtin)
    # KeyError would show the message in quotes, with line ends escaped.
    assert str(error("no 'x'\nhere; try y")) == "no 'x'\nhere; try y"
    assert str(pickle.loads(pickle.dumps(error("no 'x'")))) == "no 'x'"


def test_bad_input_names_its_sample() -> None:
    """The message carries the index; `reason` is the message without it."""
    error = BadInputError("is broken", 3)
    assert (str(error), error.reason, error.sample) == ("sample 3: is broken", "is broken", 3)
    error = BadInputError("is broken")
    assert (str(error), error.reason, error.sample) == ("is broken", "is broken", None)
    assert str(BadInputError("is broken", 0)) == "sample 0: is broken"


def test_nearest_offers_near_names_only() -> None:
    """The best first, at most as many as asked, and nothing at all where nothing is near."""
    names = ["hook_resid_pre", "hook_resid_post", "hook_embed", "zzz"]
    assert nearest("hook_resid_pst", names) == "; nearest: hook_resid_post, hook_resid_pre, hook_embed"
    assert nearest("hook_resid_pst", names, 1) == "; nearest: hook_resid_post"
    assert nearest("quux", names) == ""
    assert nearest("x", []) == ""


def test_unknown_names_what_there_is() -> None:
    """The name, what it was to be, near names and all others; an error to raise, not raised."""
    assert str(unknown("split", "tset", (n for n in ("train", "test")))) == (
        "no split 'tset'; nearest: test; there are: train, test"
    )
    assert str(unknown("adapter of x", "y", [])) == "no adapter of x 'y'; there are: none"
    assert isinstance(unknown("split", "x", []), BadInputError)


@given(st.text("abc_", min_size=3, max_size=8), st.lists(st.text("abc_", min_size=1, max_size=8), unique=True))
def test_nearest_are_half_alike_at_least(name: str, names: list[str]) -> None:
    """Every name offered is at least half like the one asked for, and a name that is there comes first."""
    offered = nearest(name, [*names, name]).removeprefix("; nearest: ").split(", ")
    assert offered[0] == name
    assert all(SequenceMatcher(None, other, name).ratio() >= 0.5 for other in offered)


def test_any_value_can_stand_in_an_error() -> None:
    """Cut, and what Python can't write by its kind: numbers of thousands of digits, lists in lists in lists."""
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert (shown("x" * 100), shown(1.5), shown("abc", 2)) == ("x" * 80, "1.5", "ab")
    assert (shown(10**6000), shown(deep)) == ("this int", "this list")
