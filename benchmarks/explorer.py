"""Time and memory of the explorer as a visitor meets it, in a browser.

`python -m benchmarks.explorer`. The page is served by the command, in a process of its own, with a small model; a
headless Chromium visits it. Measured: seconds from asking for the page to the first answer, a picture loaded and a
question typed in between; seconds from a click on Look to what a tab shows, the first time after the start and later;
the server's resident memory after 5 and after 50 visits, each of which asks and looks in every tab.
Results go to benchmarks/RESULTS.md. Needs the extra `app`, Playwright and Chromium.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from hooked_mm.scenes.dataset import SceneDataset, picture

QUESTION = "what colour is the {} ?"
WAIT = 60_000


@contextmanager
def server(model: str, log: Path) -> Iterator[tuple[str, int]]:
    """The explorer in a process of its own: its address and process id."""
    command = [sys.executable, "-u", "-m", "hooked_mm.cli", "explore", "--small", model]
    with log.open("w") as out:
        running = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            while not (found := re.search(r"http://[\d.:]+", log.read_text())):
                if running.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.2)
            yield found.group(), running.pid
        finally:
            running.terminate()
            running.wait()


def ask(page: Any, address: str, file: str, question: str) -> float:
    """Open the page, load a picture, ask; seconds to the answer."""
    start = time.perf_counter()
    page.goto(address)
    page.wait_for_selector("#hm-editor canvas")
    page.set_input_files("#hm-editor input[type=file]", file)
    page.fill("#hm-question textarea", question)
    page.wait_for_selector("#hm-editor:not(:has-text('Upload an image'))")
    page.press("#hm-question textarea", "Enter")
    page.wait_for_selector("#hm-tokens-0 input")
    # It was asked with the picture.
    page.wait_for_selector("#hm-patches-0 [data-pick]")
    return time.perf_counter() - start


def look(page: Any, tab: str) -> float:
    """Press Look in a tab; seconds to what it shows."""
    page.click(f"button[role=tab]:has-text('{tab}') >> visible=true")
    name = page.evaluate("document.querySelector('[role=tabpanel]:not([style*=none])').id")
    result = f"#{name}-result .hm"
    start = time.perf_counter()
    page.click(f"#{name}-look")
    page.wait_for_selector(result)
    return time.perf_counter() - start


def visit(browser: Any, address: str, scene: Any, file: str) -> tuple[float, dict[str, float]]:
    """One visit: seconds to the first answer, and of each tab."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(WAIT)
    first = ask(page, address, file, QUESTION.format(scene.objects[0].shape))
    tabs = [tab.inner_text() for tab in page.query_selector_all("#hm-tabs button[role=tab]")]
    found = {tab: look(page, tab) for tab in tabs}
    page.close()
    return first, found


def measure(model: str, visits: tuple[int, int], chromium: str) -> str:
    """Two tables in Markdown."""
    from playwright.sync_api import sync_playwright

    data = SceneDataset(max(visits), split="test", seed=3)
    with tempfile.TemporaryDirectory() as folder, server(model, Path(folder) / "log") as (address, process):
        memory: dict[int, float] = {}
        answers: list[float] = []
        looks: list[dict[str, float]] = []
        with sync_playwright() as running:
            browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for number in range(visits[1]):
                file = str(Path(folder) / f"{number}.png")
                picture(data.scene(number)).save(file)
                first, found = visit(browser, address, data.scene(number), file)
                answers.append(first)
                looks.append(found)
                if number + 1 in visits:
                    # What was left of the last visit is forgotten within seconds.
                    time.sleep(3)
                    memory[number + 1] = psutil.Process(process).memory_info().rss / 2**20
            browser.close()
    rows = ["| what | first time | median | slowest of later ones |", "|---|---|---|---|"]
    columns = {"page opened to first answer": answers} | {tab: [one[tab] for one in looks] for tab in looks[0]}
    for name, seconds in columns.items():
        later = seconds[1:]
        rows.append(f"| {name} | {seconds[0]:.2f} s | {statistics.median(later):.2f} s | {max(later):.2f} s |")
    few, many = visits
    rows += [
        "",
        f"Resident memory of the server: {memory[few]:,.0f} MiB after {few} visits, {memory[many]:,.0f} MiB after "
        f"{many} ({memory[many] / memory[few] - 1:+.1%}).",
    ]
    return "\n".join(rows)


def main() -> None:
    """Measure, and print what goes into RESULTS.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", default="llava")
    parser.add_argument("--visits", type=int, nargs=2, default=(5, 50))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    made = parser.parse_args()
    table = measure(made.small, tuple(made.visits), made.chromium)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "gradio"))
    machine = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"
    print(f"{date.today()}, {machine}, {packages}, small {made.small}\n\n{table}")


if __name__ == "__main__":
    main()
