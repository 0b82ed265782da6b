"""What a tab of the explorer can show, as data: the frame draws it, so that all tabs look and behave alike.

A panel that can be clicked carries a *pick*: values for controls of its tab, which are set before the tab looks again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hooked_mm.errors import BadInputError

Pick = Mapping[str, Any]
"""Name of a control -> the value that a click gives it."""


@dataclass(frozen=True)
class Note:
    """A paragraph: what is to be known, or what went wrong."""

    text: str
    kind: Literal["info", "warning"] = "info"


@dataclass(frozen=True)
class Facts:
    """Names and values in a line; numbers are shown with four digits."""

    facts: Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Picture:
    """A picture with a line under it."""

    caption: str
    image: Image.Image
    pick: Pick | None = None


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side.

    Attributes:
        pictures: In their order.
        title: Above them.
        side: Pixels of the longer side of each as it is shown.
    """

    pictures: Sequence[Picture]
    title: str = ""
    side: int = 176


@dataclass(frozen=True)
class Table:
    """Rows of values; numbers are shown with four digits.

    Attributes:
        columns: Their names.
        rows: As many values as columns each.
        title: Above it.
        picks: One per row, None for a row that can't be clicked; empty if none can.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    picks: Sequence[Pick | None] = ()

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong or (self.picks and len(self.picks) != len(self.rows)):
            raise BadInputError(
                f"a table of columns {list(self.columns)} and {len(self.rows)} rows has rows {wrong[:1]} and "
                f"{len(self.picks)} picks; give a value per column, and a pick per row or none"
            )


@dataclass(frozen=True)
class Heat:
    """Numbers as a table of colours: layers x heads, layers x tokens.

    Attributes:
        values: NaN is left grey. From zero on in one colour, below zero in another.
        rows: Names of rows, from above to below.
        columns: Names of columns.
        title: Above it.
        corner: What rows and columns are, as `layer \\ head`.
        picks: Names of the controls that a clicked cell's row and column are given to, None for neither.
        row_values: What a row's control gets; its number unless given.
        column_values: What a column's control gets; its number unless given.
        texts: What stands in a cell; nothing unless given (its number shows when pointed at).
        peak: The value in full colour; the largest of all unless given.
    """

    values: Float[Tensor, "rows cols"]
    rows: Sequence[str]
    columns: Sequence[str]
    title: str = ""
    corner: str = ""
    picks: tuple[str | None, str | None] = (None, None)
    row_values: Sequence[Any] | None = None
    column_values: Sequence[Any] | None = None
    texts: Sequence[Sequence[str]] | None = None
    peak: float | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        if shape != (len(self.rows), len(self.columns)):
            raise BadInputError(f"values of shape {shape} for {len(self.rows)} rows and {len(self.columns)} columns")
        for name, given, count in (
            ("row_values", self.row_values, len(self.rows)),
            ("column_values", self.column_values, len(self.columns)),
            ("texts", self.texts, len(self.rows)),
            *((f"texts[{number}]", row, len(self.columns)) for number, row in enumerate(self.texts or ())),
        ):
            if given is not None and len(given) != count:
                raise BadInputError(f"{name} has {len(given)} entries, not {count}")


@dataclass(frozen=True)
class Words:
    """Tokens in a line, coloured by a value each.

    Attributes:
        words: Token and value; NaN for no value.
        title: Above them.
        picks: One per token, None for one that can't be clicked; empty if none can.
        peak: The value in full colour; the largest of all unless given.
    """

    words: Sequence[tuple[str, float]]
    title: str = ""
    picks: Sequence[Pick | None] = ()
    peak: float | None = None

    def __post_init__(self) -> None:
        if self.picks and len(self.picks) != len(self.words):
            raise BadInputError(f"{len(self.words)} words and {len(self.picks)} picks; give a pick per word or none")


@dataclass(frozen=True)
class Texts:
    """Longer texts side by side, as two answers; line breaks are kept."""

    texts: Sequence[tuple[str, str]]


Panel = Note | Facts | Pictures | Table | Heat | Words | Texts
