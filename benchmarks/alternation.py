"""Seconds per alternation of semi-NMF and the dictionary, against what reading the rows costs by itself.

    python -m benchmarks.alternation --device cuda --size 1000000x4096 --k 100 --dtype bfloat16

An alternation goes through the rows once; it can't take less than memory takes to give them out. *Reading* is the sum
of all rows, chunk by chunk as they lie there; *two products* are Z C^T and A^T Z, without which there is none. All are
timed in turn, medians over rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version

import numpy as np
import torch

from concept_dict.decomposition import unit
from concept_dict.factorisation import Factorisation
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.rows import Rows
from concept_dict.semi_nmf import SemiNMF

MADE = 4096
"""Rows made at a time."""


def planted(n: int, d: int, k: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Sparse non-negative codes times random unit atoms, with noise, made where they will lie."""
    random = torch.Generator(device).manual_seed(0)
    atoms = unit(torch.randn(k, d, generator=random, device=device))
    rows = torch.empty(n, d, dtype=dtype, device=device)
    for start in range(0, n, MADE):
        size = min(MADE, n - start)
        codes = torch.rand(size, k, generator=random, device=device)
        codes *= torch.rand(size, k, generator=random, device=device) < 0.15
        noise = torch.randn(size, d, generator=random, device=device)
        rows[start : start + size] = (codes @ atoms + 0.3 / d**0.5 * noise).to(dtype)
    return rows


def seconds(work: Callable[[], object], device: str) -> float:
    """How long it takes, on a GPU until it is done there."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def products(rows: Rows, concepts: torch.Tensor) -> None:
    """Z C^T and A^T Z, chunk by chunk."""
    for _, chunk in rows.centred(True).chunks():
        (chunk @ concepts.T).T @ chunk


def read(rows: torch.Tensor) -> None:
    """Every row once."""
    for part in rows.split(MADE):
        part.sum()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="100000x1024", help="rows x width")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n, d = map(int, options.size.split("x"))
    rows = planted(n, d, options.k, options.device, getattr(torch, options.dtype))
    gigabytes = rows.numel() * rows.element_size() / 1e9
    taken, start = Rows.of(rows), unit(rows[torch.randperm(n)[: options.k]].float())
    methods: dict[str, Factorisation] = {
        "semi-NMF": SemiNMF(options.k, init=start, max_iter=10_000, tol=0),
        "dictionary": NonNegativeDictionary(options.k, init=start, max_iter=10_000, tol=0),
    }
    for method in methods.values():
        method.begin(taken)
    work: dict[str, Callable[[], object]] = {
        "reading": lambda: read(rows),
        "two products": lambda: products(taken, start),
        **{name: method.step for name, method in methods.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.rounds):
        for name, one in work.items():
            times[name].append(seconds(one, options.device))
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"CPU, {options.threads} thread(s)"
    print(f"{date.today()}, {where}, torch {version('torch')}; {options.size} {options.dtype}, k = {options.k}\n")
    print("| what | seconds | GB/s of rows | time / reading | time / two products |\n|---|---|---|---|---|")
    reading, least = np.median(times["reading"]), np.median(times["two products"])
    for name, found in times.items():
        middle = np.median(found)
        print(f"| {name} | {middle:.3f} | {gigabytes / middle:.1f} | {middle / reading:.2f} | {middle / least:.2f} |")


if __name__ == "__main__":
    main()
