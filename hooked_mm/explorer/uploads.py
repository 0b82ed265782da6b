"""Uploads of the explorer: refused when they are no pictures or too large, and kept no longer than they are needed.

Gradio writes what is uploaded into a folder, under a name made of its bytes, so that two visitors with the same picture
share a file. A file is therefore not deleted when it was read, but when it is `KEPT` seconds old: it is read as soon as
it is there, never only when a visitor's turn has come.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import gradio as gr
from fastapi import HTTPException

from hooked_mm.errors import BadInputError
from hooked_mm.explorer.edits import check_head

MOST_BYTES = 20 * 2**20
"""Of a file."""

KEPT = (60, 180)
"""Seconds between two looks for old files, and the age at which a file is deleted."""

MOST_KEPT = 2 * 2**30
"""Bytes of all uploads that lie there at the same time; beyond, none are taken until some were deleted."""

LAYERS = 8
"""Of an edited picture at most; the page draws on one."""

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
    # Not a class of its own: Gradio writes a file beside the source of every class of components. It makes a component
    # anew, without what is set here, once an event changes more of it than its value: none may.
    made = gr.ImageEditor(**options)
    made.blob_storage, read, accept = _Pending(), made.preprocess, made.accept_blobs

    def accept_blobs(data: Any) -> None:
        index = str(data.data.get("index") or "null")
        if index != "null" and not (index.isdecimal() and int(index) < LAYERS):
            raise HTTPException(422, f"at most {LAYERS} layers are taken")
        accept(data)

    def preprocess(payload: Any) -> Any:
        try:
            ahead = made.blob_storage.get(payload.id) if payload is not None and payload.id is not None else None
            for source in _sources(payload if ahead is None else ahead):
                check_head(source)
            return read(payload)
        except BadInputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            raise gr.Error("this file can't be read as a picture", print_exception=False) from error

    accept_blobs._is_server_fn = True  # type: ignore[attr-defined]
    made.preprocess, made.accept_blobs = preprocess, accept_blobs
    return made


def _sources(payload: Any) -> Iterator[Path | bytes]:
    """What an editor holds: bytes that were sent ahead, or files among the uploads, as Gradio has seen to by now."""
    parts = [getattr(payload, "background", None), getattr(payload, "composite", None)]
    for part in (*parts, *(getattr(payload, "layers", None) or ())):
        path = getattr(part, "path", None)
        if isinstance(part, bytes):
            yield part
        elif isinstance(path, str):
            yield Path(path)


def sweep(folder: Path, age: float) -> int:
    """Delete the files in a folder that are older; how many bytes are left in it.

    Args:
        folder: With all that lies in it.
        age: In seconds.
    """
    left, now = 0, time.time()
    for path, _, names in os.walk(folder):
        for name in names:
            file = Path(path, name)
            try:
                told = file.lstat()
                # Not when it was written last: a file that is copied keeps that.
                if now - told.st_ctime > age:
                    file.unlink()
                else:
                    left += told.st_size
            except OSError:
                # Moved or deleted meanwhile.
                continue
    return left


class Sweeper:
    """Deletes old uploads while open, whatever came of the request that brought them.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._end = folder, Event()
        self._thread = Thread(target=self._run, name="explorer-sweeper", daemon=True)

    def full(self) -> bool:
        """Whether so much lies there that no more can be taken until some of it is old."""
        return sweep(self._folder, KEPT[1]) > MOST_KEPT

    def _run(self) -> None:
        while not self._end.wait(KEPT[0]):
            sweep(self._folder, KEPT[1])

    def __enter__(self) -> Sweeper:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._end.set()
        self._thread.join()
