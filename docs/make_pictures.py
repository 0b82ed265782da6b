"""The README's pictures: the demo's HTML report and its TensorBoard page, as headless Chromium shows them.

`make pictures`; needs Debian's chromium.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, seconds: float = 60) -> None:
    """Until the address answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def report_picture(page: Page, report: Path, target: Path) -> None:
    """The overview table and the first cards."""
    page.set_viewport_size({"width": 1180, "height": 1480})
    page.goto(report.resolve().as_uri())
    page.wait_for_load_state("networkidle")
    page.screenshot(path=target)


def tensorboard_picture(page: Page, logs: Path, target: Path) -> None:
    """The image tab: a grid of most activating pictures per concept."""
    port = free_port()
    program = Path(sys.executable).with_name("tensorboard")
    command = [str(program), "--logdir", logs.name, "--port", str(port), "--host", "127.0.0.1"]
    # From the folder above, so that the page shows a path that is the same on every machine.
    server = subprocess.Popen(command, cwd=logs.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/data/environment")
        page.set_viewport_size({"width": 1380, "height": 940})
        page.goto(f"http://127.0.0.1:{port}/?darkMode=false#images")
        page.wait_for_selector("tf-image-loader img", timeout=60_000)
        # The pictures of the first page are still being loaded.
        page.wait_for_timeout(2500)
        page.screenshot(path=target)
    finally:
        server.terminate()
        server.wait(timeout=20)


def main() -> None:
    """Write docs/report.png and docs/tensorboard.png from a demo run, made first if it is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    if not (options.demo / "report.html").is_file():
        program = Path(sys.executable).with_name("hooked-mm")
        subprocess.run([str(program), "demo", "--output", str(options.demo)], check=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=options.chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page()
        report_picture(page, options.demo / "report.html", options.output / "report.png")
        tensorboard_picture(page, options.demo / "tensorboard", options.output / "tensorboard.png")
        browser.close()


if __name__ == "__main__":
    main()
