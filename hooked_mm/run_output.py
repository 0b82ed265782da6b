"""Where a run leaves what it found, and tables as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hooked_mm.errors import BadInputError


def output_folder(path: str | Path) -> Path:
    """The folder, made with those above it: before a run, so that none ends without a place for what it found.

    Raises:
        BadInputError: If it can't be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"the output folder {str(folder)!r} can't be made ({error}); choose another") from error
    return folder


def text_columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Cells under each other: the first `left` columns to the left, as text is read, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
