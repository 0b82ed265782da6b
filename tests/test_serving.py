"""The server: whom it answers, what it takes, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.errors import BadInputError
from hooked_mm.explorer.serving import check_reach, entrance, same, served

gradio = pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")

LIMIT = Image.MAX_IMAGE_PIXELS


def tiny_page() -> Any:
    """A page with one picture that is sent back; it counts how often its desk was closed."""
    with gradio.Blocks(analytics_enabled=False) as blocks:
        shown = gradio.Image(type="pil", format="png")
        gradio.Button().click(lambda image: image.rotate(90), shown, shown, api_name="turn")
    closed: list[bool] = []
    return SimpleNamespace(blocks=blocks, desk=SimpleNamespace(close=lambda: closed.append(True)), closed=closed)


@contextmanager
def client(**options: Any) -> Iterator[tuple[Any, Any]]:
    """A served page and somebody who calls it."""
    page = tiny_page()
    with served(page, **options) as address, httpx.Client(base_url=address, timeout=20) as http:
        yield page, http


def upload(http: Any) -> Any:
    """A picture sent to the server."""
    from io import BytesIO

    data = BytesIO()
    Image.new("RGB", (4, 2), "red").save(data, "PNG")
    return http.post("/gradio_api/upload", files={"files": ("a.png", data.getvalue())})


@pytest.mark.parametrize("kept", [None, "/somewhere/else"])
def test_nothing_is_left_behind(kept: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What visitors upload and what the page hands out lie in one folder, gone at the end; all else is as it was."""
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    if kept is not None:
        monkeypatch.setenv("GRADIO_TEMP_DIR", kept)
    with client() as (page, http):
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        sent = Path(upload(http).json()[0])
        body = {"data": [{"path": str(sent), "meta": {"_type": "gradio.FileData"}}]}
        event = http.post("/gradio_api/call/turn", json=body).json()["event_id"]
        answer = http.get(f"/gradio_api/call/turn/{event}").text
        assert "event: complete" in answer
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sent in files
        assert len(files) == 2
        assert all(str(path) in answer or path == sent for path in files)
        assert Image.MAX_IMAGE_PIXELS != LIMIT
        assert not page.closed
    assert page.closed == [True]
    assert not folder.exists()
    assert os.environ.get("GRADIO_TEMP_DIR") == kept
    assert Image.MAX_IMAGE_PIXELS == LIMIT
    with pytest.raises(httpx.ConnectError):
        httpx.get(str(http.base_url))


def test_an_error_while_it_serves_closes_it_too() -> None:
    """The folder is deleted, and the error goes on."""
    page, folders = tiny_page(), []

    def fails() -> None:
        with served(page):
            folders.append(Path(os.environ["GRADIO_TEMP_DIR"]))
            assert folders[0].is_dir()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fails()
    assert page.closed == [True]
    assert not folders[0].exists()


def test_a_port_that_is_taken_is_named() -> None:
    """One line that says what to give; nothing is left behind."""
    before, page = os.environ.get("GRADIO_TEMP_DIR"), tiny_page()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        reason = f"nothing can listen at 127.0.0.1, port {port}; give another --port"
        with pytest.raises(BadInputError, match=reason), served(page, port=port):
            pytest.fail("it was served")
    assert page.closed == [True]
    assert os.environ.get("GRADIO_TEMP_DIR") == before
    assert Image.MAX_IMAGE_PIXELS == LIMIT


def test_nobody_is_sent_to_other_machines() -> None:
    """Whichever way the address is written, the page neither fetches it nor leads there; its own files it hands out."""
    with client() as (_, http):
        for way in ("proxy=http://example.org/a", "file=http://example.org/a", "file=HTTPS://example.org/a"):
            assert http.get(f"/gradio_api/{way}").status_code == 403
        for way in (
            "file/http://example.org/a",
            "file%3Dhttp%3A%2F%2Fexample.org",
            "file/etc/passwd",
            "file=/etc/passwd",
        ):
            assert http.get(f"/gradio_api/{way}").status_code in (403, 404)
        own = upload(http).json()[0]
        assert http.get(f"/gradio_api/file={own}").status_code == 200


def test_a_password_of_any_letters_opens_the_page() -> None:
    """Only it, with any name; a wrong one is refused, not failed at, whatever it is made of."""
    with client(password="sésame 開け") as (_, http):
        for wrong in ("sésame", "", "開け sésame", "x" * 5000, "\x00"):
            assert http.post("/login", data={"username": "a", "password": wrong}).status_code in (400, 422)
        assert upload(http).status_code == 401
        assert http.post("/login", data={"username": "anybody", "password": "sésame 開け"}).status_code == 200
        assert upload(http).status_code == 200


@given(st.text(st.characters(), max_size=6), st.text(st.characters(), max_size=6))
def test_passwords_are_the_same_or_not(given_: str, password: str) -> None:
    """As Python compares them, lone surrogates too, which have no bytes."""
    assert same(given_, password) == (given_ == password)
    assert same(password, password)
    assert not same(password + "\ud800", password)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_needs_no_password(host: str) -> None:
    """Whatever it is called."""
    check_reach(host, None, False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "fe80::1", "example.org", "", "0", "localhost.org", " "])
def test_others_need_one(host: str) -> None:
    """Unless it is said that all may come; an empty password is none."""
    for password in (None, ""):
        with pytest.raises(BadInputError, match=r"lets others reach this page.*--password, or --open_to_all true"):
            check_reach(host, password, False)
        check_reach(host, password, True)
    check_reach(host, "sesame", False)


@pytest.mark.slow
def test_the_event_loop_is_imported_whatever_was_before() -> None:
    """Beside nnsight, whose `save` on every object its import stumbles at, and alone; the method is left as it was."""
    code = """
import sys
import time
if sys.argv[1] == "nnsight":
    import nnsight
from hooked_mm.explorer.serving import import_event_loop
had = hasattr(object, "save")
import_event_loop()
assert "anyio._backends._asyncio" in sys.modules
assert hasattr(object, "save") == had
print(had)
"""
    for way, had in (("nnsight", "True"), ("alone", "False")):
        done = subprocess.run([sys.executable, "-c", code, way], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == had


def test_who_guesses_a_password_waits() -> None:
    """For each guess; who knows it does not."""
    seconds = []
    for given_ in ("sesame", "sesam"):
        start = time.perf_counter()
        assert asyncio.run(entrance("sesame", wait=1)("anybody", given_)) == (given_ == "sesame")
        seconds.append(time.perf_counter() - start)
    assert seconds[0] < 1 <= seconds[1]
