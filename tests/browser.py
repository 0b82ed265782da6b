"""Headless Chromium for tests of pages; without it, or without Playwright, they skip themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser, which can reach no other machine."""
    driver = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    with driver.sync_playwright() as running:
        options = ["--no-sandbox", "--disable-background-networking"]
        browser = running.chromium.launch(executable_path=str(CHROMIUM), args=options)
        yield browser
        browser.close()


def opened(
    browser: Any, path: Path, width: int = 1300, height: int = 800, timeout: float = 20_000
) -> tuple[Any, list[str]]:
    """A page, and what it complains of or asks other machines for."""
    page, wrong = browser.new_page(viewport={"width": width, "height": height}), []
    page.set_default_timeout(timeout)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(asked.url))
    page.goto(path.as_uri())
    return page, wrong
