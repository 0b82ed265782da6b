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
