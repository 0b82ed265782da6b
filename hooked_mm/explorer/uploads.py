"""Uploads of the explorer: refused when they are no pictures or too large, and kept no longer than they are needed.

Gradio writes what is uploaded into a folder, under a name made of its bytes, so that two visitors with the same picture
share a file. A file is therefore not deleted when it was read, but when it is `KEPT` seconds old: it is read as soon as
it is there, never only when a visitor's turn has come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from hooked_mm.errors import BadInputError
from hooked_mm.explorer.edits import check_head

MOST_BYTES = 20 * 2**20
"""Of a file."""

KEPT = (60, 180)
"""Seconds between two looks for old files, and the age at which a file is deleted."""

PENDING = 32
"""Edited pictures that lie in memory before they are asked about, of all visitors together."""


class _Pending(OrderedDict[str, Any]):
    """What editors have sent ahead of a question; of pages that were closed before it, the oldest goes first."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > PENDING:
            self.popitem(last=False)


def editor(**options: Any) -> gr.ImageEditor:
    """Gradio's editor of pictures, which refuses what is none with a message that the visitor sees.

    Args:
        options: Of `gr.ImageEditor`.
    """
    # Not a class of its own: Gradio writes a file beside the source of every class of components.
    made = gr.ImageEditor(**options)
    made.blob_storage, read = _Pending(), made.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            for path in _paths(payload):
                check_head(path)
            return read(payload)
        except BadInputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            raise gr.Error("this file can't be read as a picture", print_exception=False) from error

    made.preprocess = preprocess
    return made


def _paths(payload: Any) -> Iterator[Path]:
    """The files of what an editor holds; Gradio has refused them by now if they lie elsewhere than among uploads."""
    parts = [getattr(payload, "background", None), getattr(payload, "composite", None)]
    for part in (*parts, *(getattr(payload, "layers", None) or ())):
        path = getattr(part, "path", None)
        if isinstance(path, str):
            yield Path(path)
