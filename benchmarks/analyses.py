"""Geometry of representations: time beside other implementations, agreement with them, and memory.

`python -m benchmarks.analyses`. Every method runs once a round, methods one after the other, so that what else the
machine does falls on all; a ratio is the median over rounds of their times in the same round (CPU seconds where there
is one thread). *scikit-dimension* is left out where it is not installed (`pip install scikit-dimension`). *SVD in
float64* is LLM-Microscope's formula, `A* = V diag(1 / s) U^T Y`, on centred rows over their norms. Memory is measured
in a process of its own each: the largest RssAnon (Linux, read every 5 ms) above that of the libraries and the rows
given. *Streamed* reads the rows from an activation store, which the process does not hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from analyses.anisotropy import anisotropy, principal
from analyses.intrinsic_dimension import distinct_neighbours, two_nn
from analyses.layers import Layers
from analyses.linearity import linearity, score_of
from analyses.moments import Running
from benchmarks.decomposition_memory import peak
from hooked_mm.store import ActivationStore

HOOKS = ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post")


def planted(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of about twelve dimensions with noise in all, and what a nearly linear layer makes of them; float32."""
    random = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 12, generator=random)
    x = torch.tanh(latent @ torch.randn(12, d, generator=random) / 2)
    x += 0.1 * torch.randn(n, d, generator=random) + torch.randn(d, generator=random)
    y = x + 0.5 * torch.tanh(x.roll(1, 1)) + 0.1 * torch.randn(n, d, generator=random)
    return x, y


def clock() -> float:
    """CPU seconds of this process where it has one thread, so that other work beside counts little."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def our_dimension(x: torch.Tensor, _: torch.Tensor) -> float:
    """TwoNN behind the removal of duplicates."""
    near = distinct_neighbours(x, 2).near.distances
    return two_nn(near[:, 1] / near[:, 0])


def their_dimension(x: torch.Tensor, _: torch.Tensor) -> float:
    """scikit-dimension's."""
    import skdim

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(skdim.id.TwoNN().fit(x.numpy()).dimension_)


def our_linearity(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of rows in memory."""
    return linearity(x, y).score


def their_linearity(x: torch.Tensor, y: torch.Tensor) -> float:
    """By singular values, in float64."""
    wide, target = x.double(), y.double()
    wide, target = wide - wide.mean(0), target - target.mean(0)
    wide, target = wide / wide.norm(), target / target.norm()
    left, sizes, right = torch.linalg.svd(wide, full_matrices=False)
    weight = right.T * (1 / sizes) @ left.T @ target
    return 1 - float((wide @ weight - target).square().sum())


def our_anisotropy(x: torch.Tensor, _: torch.Tensor) -> float:
    """From the Gram matrix."""
    return anisotropy(x)


def their_anisotropy(x: torch.Tensor, _: torch.Tensor) -> float:
    """By singular values, in float64."""
    sizes = torch.linalg.svdvals(x.double() - x.double().mean(0)).square()
    return float(sizes[0] / sizes.sum())


def streamed_linearity(layers: Layers) -> float:
    """Of a store."""
    width = layers.values(0, slice(0, 1)).shape[1]
    running = Running(width, width)
    for _, values in layers.batches([0, 1]):
        running.add(values[0], values[1])
    return score_of(running.pair_moments()).score


def streamed_anisotropy(layers: Layers) -> float:
    """Of a store."""
    running = Running(layers.values(0, slice(0, 1)).shape[1])
    for _, values in layers.batches([0]):
        running.add(values[0])
    return principal(running.moments())[0]


Method = Callable[[torch.Tensor, torch.Tensor], float]
METHODS: dict[str, dict[str, Method]] = {
    "intrinsic dimension": {"ours": our_dimension, "scikit-dimension": their_dimension},
    "linearity": {"ours": our_linearity, "SVD in float64": their_linearity},
    "anisotropy": {"ours": our_anisotropy, "SVD in float64": their_anisotropy},
}
"""Analysis -> method; ours first."""
STREAMED = {"linearity": streamed_linearity, "anisotropy": streamed_anisotropy}


def store_of(path: Path, x: torch.Tensor, y: torch.Tensor) -> ActivationStore:
    """The rows in a store, ten to a sample."""
    row = {"modality": "text", "role": None, "word": None, "selector": "EachOf"}
    rows = [{"sample": f"s{number // 10}", "position": number % 10, **row} for number in range(len(x))]
    samples = [{"sample": f"s{number}", "sample_number": number} for number in range(-(-len(x) // 10))]
    return ActivationStore.from_arrays(path, {HOOKS[0]: x, HOOKS[1]: y}, rows, samples, {"model": "planted"})


def times(analysis: str, size: str, rounds: int) -> None:
    """Print a line per method."""
    methods = dict(METHODS[analysis])
    if importlib.util.find_spec("skdim") is None:
        methods.pop("scikit-dimension", None)
    n, d = map(int, size.split("x"))
    x, y = planted(n, d)
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], float]] = {
            name: lambda method=method: method(x, y) for name, method in methods.items()
        }
        if analysis in STREAMED:
            layers = Layers.of_store(store_of(Path(folder) / "store", x, y))
            calls["ours, streamed"] = lambda: STREAMED[analysis](layers)
        # What is imported or compiled at a first call is no part of it.
        for method in methods.values():
            method(*planted(300, 64))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        found: dict[str, float] = {}
        for _ in range(rounds):
            for name, call in calls.items():
                started = clock()
                found[name] = call()
                seconds[name].append(clock() - started)
    ours = np.array(seconds["ours"])
    for name, taken in seconds.items():
        ratios = np.array(taken) / ours
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        apart = abs(found[name] - found["ours"])
        print(
            f"| {analysis}, {size} | {name} | {np.median(taken):.1f} | {np.median(ratios):.2f} ({each}) | "
            f"{found[name]:.9f} | {apart:.1e} |",
            flush=True,
        )


def measure(analysis: str, name: str, size: str, folder: Path | None) -> None:
    """In a process of its own: print the bytes as JSON."""
    n, d = map(int, size.split("x"))
    # Libraries load what they load only when they are used.
    small = planted(300, 64)
    if folder is not None:
        layers = Layers.of_store(ActivationStore.open(folder))
        METHODS[analysis]["ours"](*small)
        anonymous, _ = peak(lambda: STREAMED[analysis](layers))
    else:
        x, y = planted(n, d)
        METHODS[analysis][name](*small)
        anonymous, _ = peak(lambda: METHODS[analysis][name](x, y))
    print(json.dumps({"anonymous": anonymous}))


def memory(analysis: str, size: str, threads: int) -> None:
    """Print a line per method."""
    n, d = map(int, size.split("x"))
    names = [name for name in METHODS[analysis] if name != "scikit-dimension" or importlib.util.find_spec("skdim")]
    with tempfile.TemporaryDirectory() as folder:
        if analysis in STREAMED:
            store_of(Path(folder) / "store", *planted(n, d))
            names.append("ours, streamed")
        for name in names:
            words = ["--measure", analysis, name, size, "--threads", str(threads)]
            if name == "ours, streamed":
                words += ["--store", str(Path(folder) / "store")]
            command = [sys.executable, "-m", "benchmarks.analyses", *words]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            anonymous = json.loads(done.stdout.splitlines()[-1])["anonymous"]
            rows = n * d * 4 * (1 if analysis != "linearity" else 2) / 1e6
            print(f"| {analysis}, {size} | {name} | {rows:.0f} | {anonymous / 1e6:.0f} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dimension", default="20000x4096", help="rows x width for the intrinsic dimension")
    parser.add_argument("--linearity", default="50000x1024", help="rows x width for linearity")
    parser.add_argument("--anisotropy", default="50000x1024", help="rows x width for anisotropy")
    parser.add_argument("--analyses", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs=3, metavar=("ANALYSIS", "METHOD", "SIZE"), help="in a process of its own")
    parser.add_argument("--store", type=Path, help="for it")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)
    if options.measure:
        measure(*options.measure, options.store)
        return
    sizes = dict(zip(METHODS, (options.dimension, options.linearity, options.anisotropy), strict=True))
    rival = f", scikit-dimension {version('scikit-dimension')}" if importlib.util.find_spec("skdim") else ""
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {options.threads} thread(s), "
        f"Python {platform.python_version()}, torch {version('torch')}, scikit-learn {version('scikit-learn')}{rival}; "
        f"{options.rounds} rounds\n"
    )
    print("| analysis | method | seconds | time / ours (rounds) | result | from ours |\n|---|---|---|---|---|---|")
    for analysis in options.analyses:
        times(analysis, sizes[analysis], options.rounds)
    print("\n| analysis | method | rows, MB | memory besides, MB |\n|---|---|---|---|")
    for analysis in options.analyses:
        memory(analysis, sizes[analysis], options.threads)


if __name__ == "__main__":
    main()
