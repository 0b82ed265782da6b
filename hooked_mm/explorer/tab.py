"""The protocol of the explorer's tabs, and where they come from.

A tab is a thing with a name that says which controls it has and, given a question that was answered, what it shows. It
knows nothing of the page: the frame makes the controls, runs the tab in the model's thread with progress and a stop
button, draws its panels, puts two of them side by side when two pictures or two models are compared, and offers what is
shown for download together with the Python that makes it.

Packages contribute tabs by the entry-point group `hooked_mm.explorer_tabs`: a name, and a function that takes the
folders opened for the tab (`hooked-mm explore --open NAME=FOLDER`) and gives the tab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from hooked_mm.errors import BadInputError, shown, unknown
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Panel
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM

GROUP = "hooked_mm.explorer_tabs"

LONGEST = 2000
"""Characters of a text control at most."""


def _is_number(given: Any) -> bool:
    """A finite number, of no more digits than one that is shown or computed with."""
    return isinstance(given, int | float) and not isinstance(given, bool) and -1e300 < given < 1e300


@dataclass(frozen=True)
class Choice:
    """One of several.

    Attributes:
        name: Of the control in its tab.
        label: As people read it.
        options: (label, value); values are strings or numbers.
        value: Which is chosen first.
        info: A line of explanation.
        changing: Options come with what is shown (`View.options`), so the tab itself refuses what it does not know;
            None is no choice yet.
    """

    name: str
    label: str
    options: Sequence[tuple[str, Any]]
    value: Any = None
    info: str = ""
    changing: bool = False

    def checked(self, given: Any) -> Any:
        """The value, if it is one; `BadInputError` otherwise."""
        if self.changing:
            if given is None or _is_number(given) or (isinstance(given, str) and len(given) <= LONGEST):
                return given
        else:
            for _, value in self.options:
                # A page has one kind of number: 1.0 comes back as 1.
                same = type(given) is type(value) or (_is_number(given) and _is_number(value))
                if same and given == value:
                    return value
        raise unknown(f"choice for {self.label!r}", shown(given), [str(value) for _, value in self.options])


@dataclass(frozen=True)
class Number:
    """A number between two others; whole if its step and ends are."""

    name: str
    label: str
    low: float
    high: float
    value: float
    step: float = 1
    info: str = ""

    def checked(self, given: Any) -> float:
        """The value, if it is one; `BadInputError` otherwise."""
        if not _is_number(given) or not self.low <= given <= self.high:
            raise BadInputError(f"{self.label}: {shown(given)} is not between {self.low:g} and {self.high:g}")
        if not all(float(value).is_integer() for value in (self.low, self.high, self.step)):
            return float(given)
        if int(given) != given:
            raise BadInputError(f"{self.label}: {shown(given)} is not whole")
        return int(given)


@dataclass(frozen=True)
class Toggle:
    """On or off."""

    name: str
    label: str
    value: bool = False
    info: str = ""

    def checked(self, given: Any) -> bool:
        """The value, if it is one; `BadInputError` otherwise."""
        if not isinstance(given, bool):
            raise BadInputError(f"{self.label}: {shown(given)!r} is neither on nor off")
        return given


@dataclass(frozen=True)
class Text:
    """Free text, in one line."""

    name: str
    label: str
    value: str = ""
    info: str = ""

    def checked(self, given: Any) -> str:
        """The value, if it is one; `BadInputError` otherwise."""
        if not isinstance(given, str) or len(given) > LONGEST:
            raise BadInputError(f"{self.label}: a text of at most {LONGEST} characters is needed")
        return given


Control = Choice | Number | Toggle | Text


@dataclass(frozen=True)
class View:
    """What a tab found.

    Attributes:
        panels: What is shown, from above to below.
        python: How to find it again: lines that use `model`, `batch` (the answered prompt), `prompt`, `images`,
            `tokens` (numbers of the chosen answer tokens) and `points`, as in `Asked`, and end with a dictionary
            `arrays` of the same names and values as this one's.
        arrays: The numbers behind what is shown, by name.
        options: New options for controls that are `changing`: control -> (label, value).
    """

    panels: Sequence[Panel]
    python: str = "arrays = {}"
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, Sequence[tuple[str, Any]]] = field(default_factory=dict)


class Tab(Protocol):
    """A tab of the explorer.

    Attributes:
        name: In file names and addresses: lower case, no spaces. One word.
        title: On the tab.
        about: What it shows, in a sentence or two.
        order: Tabs are shown by it, then by name.
    """

    name: str
    title: str
    about: str
    order: int

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """The controls that it has for a model; their names and kinds are the same for every model."""
        ...

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> View:
        """What there is to see.

        Args:
            asked: The question, its answer, the chosen tokens and patches.
            values: Of the controls, by name, checked.
            work: Told what is done; ends the work when it shall.

        Raises:
            HookedMMError: If it can't be shown of this model or question; the message is shown in its place.
        """
        ...


def checked(controls: Sequence[Control], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values for controls as they came from a visitor, every one checked.

    Raises:
        BadInputError: If one is missing, unknown or no value of its control.
    """
    names = [control.name for control in controls]
    if set(given) != set(names):
        raise BadInputError(f"values for {sorted(map(str, given))}, but the controls are {names}")
    return {control.name: control.checked(given[control.name]) for control in controls}


def load_tabs(folders: Mapping[str, Sequence[Path]] | None = None) -> list[Tab]:
    """All tabs that installed packages contribute, in their order.

    Args:
        folders: Opened for tabs by the one who starts the page, by the tab's name.

    Raises:
        BadInputError: If folders are meant for a tab that does not exist.
    """
    found, given = {entry.name: entry for entry in entry_points(group=GROUP)}, dict(folders or {})
    for name in given:
        if name not in found:
            raise unknown("tab", name, found)
    made = [entry.load()([Path(folder) for folder in given.get(name, ())]) for name, entry in found.items()]
    return sorted(made, key=lambda tab: (tab.order, tab.name))
