"""Uploads of the explorer: refused when they are no pictures or too large, and not kept once they were read."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

MOST_BYTES = 20 * 2**20
"""Of a file."""

MOST_PIXELS = 40_000_000
"""Of a picture; told from the file's head, before anything is unpacked."""

PENDING = 32
"""Edited pictures that lie in memory before they are asked about, of all visitors together."""


class _Pending(OrderedDict[str, Any]):
    """What editors have sent ahead of a question; of pages that were closed before it, the oldest goes first."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > PENDING:
            self.popitem(last=False)


class Editor(gr.ImageEditor):
    """Gradio's editor of pictures, which refuses what is none with a message that the visitor sees."""

    is_template = True

    @classmethod
    def bounded(cls, **options: Any) -> Editor:
        """An editor that keeps no more of what was not asked about than `PENDING`."""
        # Gradio reads the settings off the constructor's signature, which must stay as it is.
        made = cls(**options)
        made.blob_storage = _Pending()
        return made

    def preprocess(self, payload: Any) -> Any:
        """The pictures as PIL images."""
        try:
            return super().preprocess(payload)
        except Image.DecompressionBombError as error:
            raise gr.Error(
                f"The picture is too large: at most {MOST_PIXELS:,} pixels. Scale it down first.", print_exception=False
            ) from error
        except (gr.Error, OSError, ValueError, SyntaxError, TypeError) as error:
            raise gr.Error("This file is no picture that can be read.", print_exception=False) from error


class Upload(gr.UploadButton):
    """A button that loads a file as bytes; it is deleted once it was read."""

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        """The file's bytes."""
        try:
            return super().preprocess(payload)
        finally:
            path = getattr(payload, "path", None)
            # Gradio has refused it by now if it lies anywhere else than among uploads.
            if isinstance(path, str):
                Path(path).unlink(missing_ok=True)
