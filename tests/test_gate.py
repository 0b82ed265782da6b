"""What the explorer's server refuses before anything looks at it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hooked_mm.explorer.gate import MOST_TEXT, Gate, is_own, name_of, refusal


def passed(scope: dict[str, Any], sent: tuple[bytes, ...] = (b"",), **options: Any) -> tuple[bytes | None, list[Any]]:
    """What an app behind the gate reads of a request, None if it never sees it; and what comes back."""
    read: list[bytes] = []
    back: list[Any] = []
    parts = iter(sent)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        read.append(b"")
        while len(read) <= len(sent):
            read.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": next(parts), "more_body": True}

    async def send(message: Any) -> None:
        back.append(message)

    asyncio.run(Gate(app, **options)(scope, receive, send))
    return (b"".join(read) if read else None), back


def request(path: str = "/config", **headers: str) -> dict[str, Any]:
    """A request as a server hands it on."""
    named = {name.replace("_", "-"): value for name, value in ({"host": "127.0.0.1:7860"} | headers).items()}
    return {"type": "http", "path": path, "headers": [(k.encode(), v.encode()) for k, v in named.items()]}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("http://example.org:80", "example.org"),
        ("Example.org:80", "example.org"),
        ("[::1]:7860", "::1"),
        ("null", "null"),
        ("", ""),
        ("http://[", ""),
    ],
)
def test_names(address: str, name: str) -> None:
    """Of origins and of hosts, with and without a port; what is none has none."""
    assert name_of(address) == name


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_own_names(name: str) -> None:
    """Whatever a machine calls itself."""
    assert is_own(name)
    assert refusal("/", {"host": f"[{name}]:1" if ":" in name else f"{name}:1"}, own_only=True) is None


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", ""])
def test_a_name_that_leads_here_is_not_own(name: str) -> None:
    """A web page can have its own name lead to 127.0.0.1 (DNS rebinding): it is told nothing."""
    assert not is_own(name)
    assert refusal("/config", {"host": f"{name}:7860"}, own_only=True) is not None
    assert refusal("/config", {"host": f"{name}:7860"}) is None


@pytest.mark.parametrize(
    ("origin", "headers", "taken"),
    [
        ("http://127.0.0.1:7860", {}, True),
        ("http://evil.example", {}, False),
        ("null", {}, False),
        ("http://localhost:7860", {}, False),
        ("https://lab.example", {"x-forwarded-host": "lab.example, inner"}, True),
        ("https://lab.example", {"host": "lab.example"}, True),
        ("https://evil.example", {"host": "lab.example"}, False),
        ("", {"host": ""}, False),
    ],
)
def test_other_pages_are_not_answered(origin: str, headers: dict[str, str], taken: bool) -> None:
    """A page of another origin neither reads nor sends anything, whatever is open beside it."""
    found = refusal("/gradio_api/upload", {"host": "127.0.0.1:7860", "origin": origin} | headers)
    assert (found is None) == taken


@pytest.mark.parametrize("path", ["/gradio_api/file=HTTP://a", "/gradio_api/proxy=x", "/gradio_api/process_recording"])
def test_what_the_page_never_asks_is_refused(path: str) -> None:
    """Other machines, recordings that would stay on the disk."""
    read, back = passed(request(path))
    assert read is None
    assert back[0]["status"] in (403, 404)


def test_what_is_no_request_passes() -> None:
    """Web sockets and the server's own start have no head."""
    for scope in ({"type": "lifespan"}, {"type": "websocket", "path": "/x"}, request("/file=a.png")):
        assert passed(scope)[0] == b""


def test_long_requests_are_refused() -> None:
    """By what they say of their length, and by their length; those with a file may be longer."""
    half = bytes(MOST_TEXT // 2 + 1)
    assert passed(request(content_length=str(MOST_TEXT + 1)))[0] is None
    read, back = passed(request("/gradio_api/queue/join", content_length="5"), (half, half))
    assert back[0]["status"] == 413
    assert read is not None
    assert len(read) == len(half)
    assert passed(request("/gradio_api/queue/join"), (half,))[1][0]["status"] == 200
    assert passed(request("/gradio_api/upload"), (half, half), most_bytes=3 * len(half))[0] == half + half
    assert passed(request("/gradio_api/upload"), (half, half), most_bytes=len(half))[1][0]["status"] == 413


def test_a_full_disk_takes_no_more() -> None:
    """Uploads are refused for a while, all else goes on."""
    assert passed(request("/gradio_api/upload"), full=lambda: True)[1][0]["status"] == 503
    assert passed(request("/gradio_api/queue/join"), full=lambda: True)[1][0]["status"] == 200
