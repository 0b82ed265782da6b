"""The explorer as a server: who may reach it, what it takes, and how it ends."""

from __future__ import annotations

import hmac
import ipaddress
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from PIL import Image

from hooked_mm.errors import BadInputError

LOCAL = "127.0.0.1"


def check_reach(host: str, password: str | None, open_to_all: bool) -> None:
    """Refuse to be reached by others without a password, unless that is wanted.

    Raises:
        BadInputError: It says how.
    """
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not password and not open_to_all:
        raise BadInputError(
            f"--host {host} lets others reach this page, and anybody could use the model; give --password, or "
            "--open_to_all true if that is what you want"
        )


def same(given: str, password: str) -> bool:
    """Whether that is the password; how long it takes tells nothing of it."""
    # Also what no text can be written as, which a request can hold.
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), password.encode("utf-8", "surrogatepass"))


def import_event_loop() -> None:
    """Import what the server runs on, whatever was imported before.

    nnsight gives every object a method `save`, classes under construction included, at which anyio's sockets stumble:
    they take it for an attribute without a type. Once imported they are no longer affected.
    """
    if not hasattr(object, "save"):
        import_module("anyio._backends._asyncio")
        return
    from nnsight import _c, save

    _c.unmount("save")
    try:
        import_module("anyio._backends._asyncio")
    finally:
        _c.mount(save, "save")


class AtHome:
    """Refuses requests that would have this server ask another machine; Gradio passes any address on.

    Args:
        app: What answers all others.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        path = scope["path"].lower() if scope["type"] == "http" else ""
        if any(part in path for part in ("/proxy=", "/file=http", "/file/http")):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this page hands out nothing of other machines"})
        else:
            await self.app(scope, receive, send)


def keep_at_home(block: Any, folder: str) -> None:
    """Let a component of the page keep its files in a folder, and fetch none from the web.

    Components remember the folder of the time when they were made, and what lies elsewhere is not handed out.
    """
    block.GRADIO_CACHE = folder
    move = block.async_move_resource_to_block_cache

    async def kept(path: Any) -> Any:
        if str(path).lower().startswith("http"):
            raise BadInputError("this page fetches nothing from other machines; upload the file")
        return await move(path)

    block.async_move_resource_to_block_cache = kept


@contextmanager
def served(
    page: Any, host: str = LOCAL, port: int | None = None, password: str | None = None, css: str = ""
) -> Iterator[str]:
    """Serve a page while open; its uploads lie in a folder of their own, which is deleted at the end.

    Args:
        page: A `web_page.Page`.
        host: The address to listen at.
        port: The port; a free one from 7860 on unless given.
        password: What visitors must enter (with any name); None for no password.
        css: The page's style.

    Yields:
        The page's address.

    Raises:
        BadInputError: If nothing can listen there.
    """
    import gradio as gr

    from hooked_mm.explorer.edits import MOST_PIXELS
    from hooked_mm.explorer.uploads import MOST_BYTES

    import_event_loop()
    folder = tempfile.mkdtemp(prefix="hooked-mm-explorer-")
    before = os.environ.get("GRADIO_TEMP_DIR"), Image.MAX_IMAGE_PIXELS
    os.environ["GRADIO_TEMP_DIR"] = folder
    for block in page.blocks.blocks.values():
        keep_at_home(block, folder)
    # Pillow refuses what is more than twice as large.
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
    try:
        try:
            _, address, _ = page.blocks.launch(
                server_name=host,
                server_port=port,
                auth=None if not password else lambda _, given: same(given, password),
                auth_message="The password of whoever runs this page, with any name." if password else None,
                max_file_size=MOST_BYTES,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                show_error=False,
                ssr_mode=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                allowed_paths=[],
                app_kwargs={"middleware": [(AtHome, (), {})]},
                theme=gr.themes.Default(),
                css=css,
            )
        except OSError as error:
            place = host if port is None else f"{host}, port {port}"
            raise BadInputError(
                f"nothing can listen at {place}; give another --port, or a --host of this machine"
            ) from error
        yield address
    finally:
        page.blocks.close(verbose=False)
        page.desk.close()
        shutil.rmtree(folder, ignore_errors=True)
        Image.MAX_IMAGE_PIXELS = before[1]
        if before[0] is None:
            os.environ.pop("GRADIO_TEMP_DIR", None)
        else:
            os.environ["GRADIO_TEMP_DIR"] = before[0]
