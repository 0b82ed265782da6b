"""The errors this package raises. Each names the value, the reason and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class HookedMMError(Exception):
    """Base of all errors raised by this project's packages."""


class UnknownHookError(HookedMMError, KeyError):
    """A hook name that this model does not have, or that was not cached."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnsupportedModelError(HookedMMError, NotImplementedError):
    """A model whose structure was not recognised."""


class ConformanceError(HookedMMError):
    """A model of which some hook points do not mean what their names say. `report` is the whole report."""

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


class BadInputError(HookedMMError, ValueError):
    """An input that can't be used: a missing or broken image, an empty prompt, image tokens that do not match.

    `sample` is the index of the offending sample in the call, where there is one.
    """

    def __init__(self, message: str, sample: int | None = None) -> None:
        super().__init__(message if sample is None else f"sample {sample}: {message}")
        self.reason, self.sample = message, sample


class UnknownWordError(BadInputError):
    """A word of interest that the tokenizer can't produce, so that it could never be found."""


class StoreError(HookedMMError, ValueError):
    """An activation store or a saved cache that is incomplete, of another making, or not one at all."""


def shown(value: Any, most: int = 80) -> str:
    """A value as it stands in an error, cut: Python refuses to write numbers of thousands of digits and deep lists."""
    try:
        return str(value)[:most]
    except (ValueError, RecursionError):
        return f"this {type(value).__name__}"


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """`; nearest: a, b` for an error message, or an empty string."""
    close = get_close_matches(name, list(names), n=count, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def unknown(what: str, name: str, names: Iterable[str]) -> BadInputError:
    """The error for a name that is none of the known ones: `no split 'tset'; nearest: test; there are: train, test`."""
    known = list(names)
    listed = known if len(known) <= 30 else [*known[:10], f"... ({len(known)} in all)"]
    return BadInputError(f"no {what} {name!r}{nearest(name, known)}; there are: {', '.join(listed) or 'none'}")
