"""Our decompositions against scikit-learn and overcomplete: time as a ratio, and the objective each ends at.

`python -m benchmarks.decompositions`. Runs are interleaved and repeated; the table shows medians. Rivals that are not
installed are left out (`pip install --no-deps overcomplete`; its package needs torchvision, its decompositions do not).
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import time
import types
from collections.abc import Callable
from datetime import date
from importlib.metadata import version

import numpy as np
import sklearn.cluster
import torch

from concept_dict.kmeans import KMeans
from concept_dict.semi_nmf import SemiNMF

# What a method returns: ||Z - A C||^2 of its result.
Method = Callable[[torch.Tensor, int], float]


def planted(n: int, d: int, k: int, seed: int = 0) -> torch.Tensor:
    """Sparse non-negative codes times random unit atoms, with noise; centred float32 rows."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((k, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = rng.exponential(size=(n, k)) * (rng.random((n, k)) < 0.15)
    rows = codes @ atoms + 0.3 / d**0.5 * rng.standard_normal((n, d))
    return torch.tensor(rows - rows.mean(0), dtype=torch.float32)


def ours(**options: float) -> Method:
    """Our semi-NMF with options."""

    def run(rows: torch.Tensor, k: int) -> float:
        return SemiNMF(k, center=False, **options).fit(rows).reconstruction_err_ ** 2  # type: ignore[arg-type]

    return run


def overcomplete() -> Method | None:
    """overcomplete's semi-NMF, imported without its vision models."""
    spec = importlib.util.find_spec("overcomplete")
    if spec is None:
        return None
    package = types.ModuleType("overcomplete")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["overcomplete"] = package
    from overcomplete.optimization import SemiNMF as Rival

    def run(rows: torch.Tensor, k: int) -> float:
        torch.manual_seed(0)
        codes, atoms = Rival(nb_concepts=k).fit(rows)
        return float((rows - codes @ atoms).square().sum())

    return run


def our_kmeans(rows: torch.Tensor, k: int) -> float:
    """Our k-means, four starts."""
    return KMeans(k, center=False, n_init=4).fit(rows).inertia_


def their_kmeans(rows: torch.Tensor, k: int) -> float:
    """scikit-learn's k-means, four starts."""
    return float(sklearn.cluster.KMeans(k, n_init=4, random_state=0).fit(rows.numpy()).inertia_)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["2000x1024", "4000x2048"], help="rows x width")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rival = overcomplete()
    groups: dict[str, dict[str, Method]] = {
        "semi-NMF": {"ours, alpha 0": ours(alpha=0.0), "ours, alpha .01": ours()},
        "k-means": {"ours": our_kmeans, "scikit-learn": their_kmeans},
    }
    if rival is not None:
        groups["semi-NMF"]["overcomplete"] = rival
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {options.threads} thread(s), "
        f"Python {platform.python_version()}, torch {version('torch')}, scikit-learn {version('scikit-learn')}; "
        f"k = {options.k}, medians of {options.repeats}\n"
    )
    print("| rows | method | seconds | time / ours | relative error |\n|---|---|---|---|---|")
    for size in options.sizes:
        n, d = map(int, size.split("x"))
        rows = planted(n, d, options.k)
        total = float(rows.double().square().sum())
        for group, methods in groups.items():
            seconds: dict[str, list[float]] = {name: [] for name in methods}
            errors: dict[str, float] = {}
            for _ in range(options.repeats):
                for name, method in methods.items():
                    started = time.perf_counter()
                    errors[name] = (method(rows, options.k) / total) ** 0.5
                    seconds[name].append(time.perf_counter() - started)
            first = np.median(next(iter(seconds.values())))
            for name, times in seconds.items():
                middle = np.median(times)
                print(f"| {size} | {group}: {name} | {middle:.2f} | {middle / first:.2f} | {errors[name]:.4f} |")


if __name__ == "__main__":
    main()
