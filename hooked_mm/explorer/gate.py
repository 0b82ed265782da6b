"""What the explorer's server answers before anything else looks at it: requests of its own page, of a bounded size.

| refused | because |
|---|---|
| addresses of other machines | Gradio hands them on, so that anybody could look around behind this server |
| recordings, links to a state | the page has none; they are written to the disk |
| a page of another origin | it would act in the name of a visitor who happens to have it open |
| another name of this machine | somebody else may own it and lead it here; only where no password is asked |
| more bytes than the page sends | they would lie in memory |
| uploads beyond what may lie there | they would fill the disk |
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

ABROAD = ("/proxy=", "/file=http", "/file/http")
"""Parts of addresses that lead to other machines."""

UNUSED = ("/process_recording", "/deep_link", "/custom_component/")
"""Parts of addresses that the page never asks for, and that write or run something."""

WITH_FILES = ("/upload", "/component_server")
"""Parts of addresses that take files."""

MOST_TEXT = 2**20
"""Bytes of a request that holds no file: a question is a few thousand, a look a few hundred."""


def is_own(name: str) -> bool:
    """Whether that is what a machine calls itself, whoever asks: no name server is asked for it."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def name_of(address: str) -> str:
    """The machine's name in `http://NAME:PORT` or in `NAME:PORT`; nothing if there is none."""
    try:
        return urlsplit(address if "//" in address else f"//{address}").hostname or ""
    except ValueError:
        return ""


def refusal(path: str, headers: Mapping[str, str], own_only: bool = False) -> tuple[int, str] | None:
    """Why a request is refused by its address and head alone: status and reason; None if it is not.

    Args:
        path: Of its address.
        headers: With names in lower case.
        own_only: Whether nobody but this machine shall ask.
    """
    path = path.lower()
    if any(part in path for part in ABROAD):
        return 403, "this page hands out nothing of other machines"
    if any(part in path for part in UNUSED):
        return 404, "this page has no such thing"
    asked = name_of(headers.get("host", ""))
    if own_only and not is_own(asked):
        return 403, "this page is for its own machine; open it as localhost, or start it with --password"
    # A proxy in front may ask by another name, and tells the first.
    names = {asked, name_of(headers.get("x-forwarded-host", "").split(",")[0].strip())} - {""}
    if "origin" in headers and name_of(headers["origin"]) not in names:
        return 403, "this page answers no other page"
    return None


class _TooLong(Exception):
    """A request that goes on beyond what may come."""


class Gate:
    """Stands before an ASGI app.

    Args:
        app: What answers what is let through.
        own_only: Whether nobody but this machine shall ask.
        most_bytes: Of a request with a file.
        full: Whether no more uploads can be taken.
    """

    def __init__(
        self, app: Any, own_only: bool = False, most_bytes: int = MOST_TEXT, full: Callable[[], bool] = lambda: False
    ) -> None:
        self.app, self.own_only, self.most_bytes, self.full = app, own_only, most_bytes, full

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope.get("headers", ())}
        files = any(part in scope["path"].lower() for part in WITH_FILES)
        most, size, begun = self.most_bytes if files else MOST_TEXT, 0, False
        told = headers.get("content-length", "0")
        refused = refusal(scope["path"], headers, self.own_only)
        if refused is None and told.isdigit() and int(told) > most:
            refused = 413, f"a request of more than {most} bytes"
        if refused is None and files and self.full():
            refused = 503, "too many files were uploaded at the same time; try again in some minutes"
        if refused is not None:
            await _answer(send, *refused)
            return

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body") or b"")
            # It may say nothing of its length, or something else.
            if size > most:
                raise _TooLong
            return message

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLong:
            if not begun:
                await _answer(send, 413, f"a request of more than {most} bytes")


async def _answer(send: Any, status: int, reason: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": reason.encode()})
