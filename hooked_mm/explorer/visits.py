"""What visitors of the explorer have asked, each for themselves: a visit per open page, gone when it is closed."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

from PIL import Image

from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked, Point
from hooked_mm.explorer.conversation import Conversation, ModelName
from hooked_mm.explorer.tab import View
from hooked_mm.explorer.work import Work

MOST = 64
"""Visits that are kept at the same time; beyond, the one that was idle for longest is closed."""

Cell = tuple[int, int, int]
"""A patch: picture, row, column."""


@dataclass
class Side:
    """What one model was asked of one set of pictures; when two are compared a visit has two.

    Attributes:
        name: The model.
        conversation: All turns so far.
        asked: The last answered question, as tabs look at it; None before the first.
        cells: The patches that were chosen.
    """

    name: ModelName
    conversation: Conversation = field(default_factory=Conversation)
    asked: Asked | None = None
    cells: tuple[Cell, ...] = ()

    def toggle(self, picture: int, row: int, col: int) -> None:
        """Choose a patch, or no longer.

        Raises:
            BadInputError: If there is no such patch.
        """
        there = self.asked is not None and 0 <= picture < len(self.asked.images)
        patches = self.asked.patches(picture) if self.asked is not None and there else None
        if patches is None or not (0 <= row < patches.rows and 0 <= col < patches.cols):
            raise BadInputError(f"there is no patch in row {row}, column {col} of picture {picture}; ask first")
        cell = (picture, row, col)
        self.cells = tuple(one for one in self.cells if one != cell) + (() if cell in self.cells else (cell,))

    def points(self) -> tuple[Point, ...]:
        """The middles of the chosen patches."""
        found: list[Point] = []
        for picture, row, col in self.cells:
            patches = self.asked.patches(picture) if self.asked else None
            if patches is not None:
                found.append((picture, *patches.centre(row, col)))
        return tuple(found)


@dataclass(frozen=True)
class Seen:
    """What a tab showed of one side: the question with the tokens and patches chosen then, and its view."""

    asked: Asked
    view: View


@dataclass
class Visit:
    """One open page.

    Attributes:
        sides: One, or two that are compared.
        drawn: What the editor holds.
        tray: Pictures for the next question, beside the one in the editor.
        sent: Per side, the picture that was shown with the last question, so that it is not shown again.
        other: The picture that the second side is shown instead.
        seen: What each tab shows, per side.
        number: Counts answered questions; what was found of an earlier one is not shown as this one's.
        work: What is being done for it.
    """

    sides: list[Side]
    drawn: Image.Image | None = None
    tray: list[Image.Image] = field(default_factory=list)
    sent: list[Image.Image | None] = field(default_factory=lambda: [None, None])
    other: Image.Image | None = None
    seen: dict[str, tuple[Seen, ...]] = field(default_factory=dict)
    number: int = 0
    work: Work | None = None

    def clear(self, sides: Sequence[ModelName]) -> None:
        """Begin anew."""
        self.stop()
        self.sides = [Side(name) for name in sides]
        self.drawn, self.tray, self.sent, self.other, self.seen = None, [], [None, None], None, {}
        self.number += 1

    def compare_no_more(self) -> None:
        """Forget the second side, and what is being done: it would bring it back."""
        self.stop()
        self.sides, self.seen = self.sides[:1], {}
        self.sent[1] = None
        self.number += 1

    def stop(self) -> None:
        """End what is being done for it."""
        if self.work is not None:
            self.work.stop()

    def halt(self, seconds: float = 5.0) -> None:
        """End what is being done for it and wait, so long at most: what is shown next is not painted over by it."""
        self.stop()
        end = time.monotonic() + seconds
        while self.work is not None and time.monotonic() < end:
            time.sleep(0.02)


class Visits:
    """All open visits by their key, which only the page knows that it belongs to.

    Args:
        first: The models that a new visit has.
        most: Visits at the same time.
    """

    def __init__(self, first: Sequence[ModelName], most: int = MOST) -> None:
        self._first, self._most = tuple(first), most
        self._open: OrderedDict[str, Visit] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._open)

    def of(self, key: str | None) -> Visit:
        """The visit of a page, begun if it is new.

        Raises:
            BadInputError: Without a key: nobody shares a visit with others.
        """
        if not key:
            raise BadInputError("a request without a session; open the page in a browser")
        with self._lock:
            visit = self._open.pop(key, None) or Visit([Side(name) for name in self._first])
            self._open[key] = visit
            gone = [self._open.popitem(last=False)[1] for _ in range(len(self._open) - self._most)]
        for other in gone:
            other.stop()
        return visit

    def close(self, key: str | None) -> None:
        """Forget a visit, and end what is being done for it."""
        with self._lock:
            visit = self._open.pop(key or "", None)
        if visit is not None:
            visit.stop()

    def close_all(self) -> None:
        """Forget all of them."""
        with self._lock:
            keys = list(self._open)
        for key in keys:
            self.close(key)
