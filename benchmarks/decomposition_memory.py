"""Peak memory of learning a dictionary from a store, by the store's size.

`python -m benchmarks.decomposition_memory`. Stores of bfloat16 rows are written to a temporary folder one after the
other; `learning.learn` runs on each in a fresh process, which samples `/proc/self/status` (Linux). *Anonymous* is what
the process itself allocated (RssAnon) above what it held before it opened the store; *resident* (VmHWM) counts pages
of the memory-mapped store as well, which the system takes back when it needs them. Stores whose rows fit as float32
into `rows.HELD_BYTES` are held, larger ones are read chunk by chunk; the slope is that of the latter.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from concept_dict.dictionary import METHODS
from concept_dict.factorisation import Factorisation
from concept_dict.learning import learn
from concept_dict.rows import HELD_BYTES
from hooked_mm.store import ActivationStore
from hooked_mm.store_writer import StoreWriter

ROWS_AT_ONCE = 2_000
TARGET = 8.0
"""Gigabytes of the store that the figures are extended to."""


def write(path: Path, gigabytes: float, width: int) -> None:
    """A store of sparse codes of random directions with noise."""
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, width, generator=random), dim=1)
    writer = StoreWriter(path, {"model": "none", "hooks": ["h"], "seed": 0})
    for number in range(max(1, round(gigabytes * 1e9 / 2 / width / ROWS_AT_ONCE))):
        codes = torch.rand(ROWS_AT_ONCE, 40, generator=random) * (torch.rand(ROWS_AT_ONCE, 40, generator=random) < 0.15)
        values = codes @ directions + 0.3 / width**0.5 * torch.randn(ROWS_AT_ONCE, width, generator=random)
        names = [f"s{number * ROWS_AT_ONCE + row}" for row in range(ROWS_AT_ONCE)]
        rows = [
            {"sample": name, "position": 0, "modality": "text", "role": "answer", "word": "", "selector": "all"}
            for name in names
        ]
        writer.add(values={"h": values.bfloat16()}, rows=rows, samples=[{"sample": name} for name in names])
    writer.close()


def resident() -> dict[str, int]:
    """This process's memory in bytes, by the system's names."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0] in ("RssAnon:", "VmHWM:")}


def peak(work: Callable[[], object]) -> tuple[int, int]:
    """Largest RssAnon while this ran above that before, and VmHWM."""
    before, seen, ended = resident()["RssAnon"], [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            seen[0] = max(seen[0], resident()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    ended.set()
    watcher.join()
    return seen[0] - before, resident()["VmHWM"]


def measure(path: Path, method: str, k: int, width: int, threads: int) -> None:
    """In a process of its own: print bytes as JSON."""
    torch.set_num_threads(threads)
    # Every kind of pass once or twice: another one takes what the last gave back.
    made = METHODS[method](k).set_params(max_iter=2)
    if isinstance(made, Factorisation):
        # Instead of its start by k-means, which goes through the rows dozens of times and is a method of its own here.
        made.set_params(init=torch.randn(k, width, generator=torch.Generator().manual_seed(0)))
    with tempfile.TemporaryDirectory() as folder:
        anonymous, high = peak(lambda: learn(ActivationStore.open(path), "h", made, folder, k=[k]))
    print(json.dumps({"anonymous": anonymous, "high": high}))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.1, 0.25, 0.4, 0.6, 1.2, 1.8], help="gigabytes")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=["SemiNMF"], choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs=2, metavar=("STORE", "METHOD"), help="in a process of its own")
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1], options.k, options.width, options.threads)
        return
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {options.threads} thread(s), "
        f"Python {platform.python_version()}, torch {version('torch')}; width {options.width}, k = {options.k}\n"
    )
    print("| method | store, GB | rows are | anonymous, MB | resident, MB |\n|---|---|---|---|---|")
    read: dict[str, list[tuple[float, float, float]]] = {method: [] for method in options.methods}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            write(store, size, options.width)
            for method in options.methods:
                words = ["--measure", str(store), method, "--k", str(options.k)]
                words += ["--width", str(options.width), "--threads", str(options.threads)]
                command = [sys.executable, "-m", "benchmarks.decomposition_memory", *words]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                held = 2 * size * 1e9 <= HELD_BYTES
                anonymous, high = found["anonymous"] / 1e6, found["high"] / 1e6
                how = "held" if held else "read in chunks"
                print(f"| {method} | {size} | {how} | {anonymous:.0f} | {high:.0f} |", flush=True)
                if not held:
                    read[method].append((size, anonymous, high))
    for method, points in read.items():
        if len(points) > 1:
            sizes, anonymous, high = zip(*points, strict=True)
            for name, values in (("anonymous", anonymous), ("resident", high)):
                slope, base = np.polyfit(sizes, values, 1)
                there = base + slope * TARGET
                print(f"\n{method}, {name}: {slope:.0f} MB per GB of store; at {TARGET:g} GB {there:.0f} MB")


if __name__ == "__main__":
    main()
