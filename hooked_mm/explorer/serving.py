"""The explorer as a server: who may reach it, what it takes, and how it ends."""

from __future__ import annotations

import asyncio
import hmac
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from hooked_mm.errors import BadInputError
from hooked_mm.explorer.gate import MOST_TEXT, Gate, is_own

LOCAL = "127.0.0.1"


def check_reach(host: str, password: str | None, open_to_all: bool) -> None:
    """Refuse to be reached by others without a password, unless that is wanted.

    Raises:
        BadInputError: It says how.
    """
    if not is_own(host) and not password and not open_to_all:
        raise BadInputError(
            f"--host {host} lets others reach this page, and anybody could use the model; give --password, or "
            "--open_to_all true if that is what you want"
        )


def same(given: str, password: str) -> bool:
    """Whether that is the password; how long it takes tells nothing of it."""
    # Also what no text can be written as, which a request can hold.
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), password.encode("utf-8", "surrogatepass"))


def entrance(password: str, wait: float = 1.0) -> Callable[[str, str], Awaitable[bool]]:
    """Whether a visitor may enter, by any name; who guesses waits so many seconds, and nobody else with them."""

    async def enter(_: str, given: str) -> bool:
        if same(given, password):
            return True
        await asyncio.sleep(wait)
        return False

    return enter


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


def keep_in(blocks: Any, folder: str) -> None:
    """Let all components of a page hand out what lies in a folder; they remember that of the time they were made."""
    for block in blocks.blocks.values():
        block.GRADIO_CACHE = folder


async def _fetches_nothing(*_: Any, **__: Any) -> Any:
    import gradio as gr

    raise gr.Error("this page fetches nothing from other machines; upload the file", print_exception=False)


@contextmanager
def _with(target: MutableMapping[str, Any], **values: Any) -> Iterator[None]:
    """Have other values in a table while open."""
    before = {name: target[name] for name in values if name in target}
    target.update(values)
    try:
        yield
    finally:
        for name in values:
            target.pop(name, None)
        target.update(before)


@contextmanager
def _at_home(folder: str) -> Iterator[None]:
    """While open Gradio fetches nothing, writes whatever it takes into a folder, and Pillow unpacks nothing huge.

    A component may be made anew for a visitor at any time, so that this is held where all of them pass.
    """
    from gradio import processing_utils, route_utils

    from hooked_mm.explorer.edits import MOST_PIXELS

    # Of an upload that ends too early the rest would otherwise stay elsewhere.
    parts = route_utils.GradioMultiPartParser.__init__.__kwdefaults__
    with (
        _with(os.environ, GRADIO_TEMP_DIR=folder),
        _with(parts, upload_dir=folder),
        _with(vars(processing_utils), async_ssrf_protected_get=_fetches_nothing),
        # Pillow refuses what is more than twice as large.
        _with(vars(Image), MAX_IMAGE_PIXELS=MOST_PIXELS // 2),
    ):
        yield


@contextmanager
def served(
    page: Any,
    host: str = LOCAL,
    port: int | None = None,
    password: str | None = None,
    css: str = "",
    open_to_all: bool = False,
) -> Iterator[str]:
    """Serve a page while open; its uploads lie in a folder of their own, which is deleted at the end.

    Args:
        page: A `web_page.Page`.
        host: The address to listen at.
        port: The port; a free one from 7860 on unless given.
        password: What visitors must enter (with any name); None for no password.
        css: The page's style.
        open_to_all: Whether a page without a password may be asked by other names than this machine's own.

    Yields:
        The page's address.

    Raises:
        BadInputError: If nothing can listen there.
    """
    import gradio as gr

    from hooked_mm.explorer.uploads import MOST_BYTES, Sweeper
    from hooked_mm.explorer.visits import MOST

    import_event_loop()
    folder = tempfile.mkdtemp(prefix="hooked-mm-explorer-")
    own_only = is_own(host) and not password and not open_to_all
    with _at_home(folder), Sweeper(Path(folder)) as sweeper:
        gate = {"own_only": own_only, "most_bytes": MOST_BYTES + MOST_TEXT, "full": sweeper.full}
        keep_in(page.blocks, folder)
        try:
            try:
                _, address, _ = page.blocks.launch(
                    server_name=host,
                    server_port=port,
                    auth=entrance(password) if password else None,
                    auth_message="The password of whoever runs this page, with any name." if password else None,
                    max_file_size=MOST_BYTES,
                    # Models run in a thread of their own; each of these keeps memory of its own.
                    max_threads=8,
                    state_session_capacity=MOST,
                    prevent_thread_lock=True,
                    quiet=True,
                    share=False,
                    show_error=False,
                    ssr_mode=False,
                    run_history=False,
                    enable_monitoring=False,
                    footer_links=[],
                    allowed_paths=[],
                    app_kwargs={"middleware": [(Gate, (), gate)]},
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
