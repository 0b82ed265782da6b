"""The README's picture of the explorer: a visit in headless Chromium, `python docs/explorer_picture.py`."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

from hooked_mm.scenes.dataset import SceneDataset, picture

ROOT = Path(__file__).parent.parent

CHROMIUM = ["--no-sandbox", "--disable-background-networking", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
"""The last two draw WebGL, which the editor needs, without a graphics card."""


@contextmanager
def explorer(log: Path) -> Iterator[str]:
    """The address of the explorer while it runs with the small LLaVA."""
    with log.open("w") as out:
        command = [sys.executable, "-u", "-m", "hooked_mm.cli", "explore", "--small", "llava"]
        running = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            while not (found := re.search(r"http://[\d.:]+", log.read_text())):
                if running.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.2)
            yield found.group()
        finally:
            running.terminate()
            running.wait(timeout=30)


def main() -> None:
    """Write docs/explorer.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "explorer.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        scene = Path(folder) / "scene.png"
        picture(SceneDataset(24, split="test", seed=7).scene(3)).save(scene)
        browser = driver.chromium.launch(executable_path=options.chromium, args=CHROMIUM)
        with explorer(Path(folder) / "log") as address:
            page = browser.new_page(viewport={"width": 1320, "height": 1730})
            page.goto(address)
            page.wait_for_selector("#hm-editor canvas")
            page.set_input_files("#hm-editor input[type=file]", scene)
            page.wait_for_selector("#hm-editor:not(:has-text('Upload an image'))")
            page.fill("#hm-question textarea", "describe the scene in short .")
            page.press("#hm-question textarea", "Enter")
            page.wait_for_selector("#hm-tokens-0 input >> nth=3")
            for word in ("green", "blue"):
                page.check(f"#hm-tokens-0 label:has-text('{word}') input >> nth=0")
            page.click("#hm-attention label:has-text('each token, one head')")
            page.click("#hm-attention-look")
            page.wait_for_selector("#hm-attention-result .hm img")
            # The mouse's mark is no part of it.
            page.mouse.move(5, 5)
            page.wait_for_timeout(500)
            page.evaluate("window.scrollTo(0, 0)")
            page.screenshot(path=options.output)
        browser.close()


if __name__ == "__main__":
    main()
