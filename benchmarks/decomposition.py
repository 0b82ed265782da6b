"""Our decompositions against scikit-learn and overcomplete: time as a ratio, and the objective each ends at.

`python -m benchmarks.decomposition`. Runs are interleaved and repeated; the table shows medians. A pair begins
at the same start where it can; the objective is that of the result, in float64. A rival that is not installed is left
out (`pip install --no-deps overcomplete`; its package needs torchvision, its decompositions do not).

| group | objective |
|---|---|
| dictionary | 1/2 ||Z - A C||^2 + lambda sum(A), A >= 0, ||c_k|| <= 1, from the same concepts |
| semi-NMF | ||Z - A C||^2, A >= 0 |
| k-means | inertia, the same number of starts |
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
from sklearn.decomposition import DictionaryLearning

from concept_dict.decomposition import unit
from concept_dict.kmeans import KMeans
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.semi_nmf import SemiNMF

ALPHA = 0.1
"""Price of activations, relative to the rows' root mean square norm."""

Method = Callable[[torch.Tensor, int], float]
"""Rows and k to the objective of the result; what it does is timed."""


def planted(n: int, d: int, k: int, seed: int = 0) -> torch.Tensor:
    """Sparse non-negative codes times random unit atoms, with noise; centred float32 rows."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((k, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = rng.exponential(size=(n, k)) * (rng.random((n, k)) < 0.15)
    rows = codes @ atoms + 0.3 / d**0.5 * rng.standard_normal((n, d))
    return torch.tensor(rows - rows.mean(0), dtype=torch.float32)


def start(rows: torch.Tensor, k: int) -> torch.Tensor:
    """Concepts to begin with: rows drawn by chance."""
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:k]
    return unit(rows[drawn])


def priced(rows: torch.Tensor, codes: torch.Tensor, concepts: torch.Tensor, penalty: float) -> float:
    """1/2 ||Z - A C||^2 + lambda sum(A) in float64."""
    rest = rows.double() - codes.double() @ concepts.double()
    return 0.5 * float(rest.square().sum()) + penalty * float(codes.double().sum())


def our_dictionary(rows: torch.Tensor, k: int) -> float:
    """Ours."""
    fitted = NonNegativeDictionary(k, alpha=ALPHA, init=start(rows, k), center=False).fit(rows)
    return fitted.objective_history_[-1] / 2


def their_dictionary(rows: torch.Tensor, k: int) -> float:
    """scikit-learn's, by coordinate descent as XL-VLMs calls it."""
    penalty = ALPHA * float(rows.double().square().sum() / len(rows)) ** 0.5
    first = start(rows, k).numpy()
    learner = DictionaryLearning(
        k,
        alpha=penalty,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        transform_alpha=penalty,
        positive_code=True,
        dict_init=first,
        code_init=np.zeros((len(rows), k), np.float32),
        random_state=0,
    )
    codes = learner.fit_transform(rows.numpy())
    return priced(rows, torch.as_tensor(codes), torch.as_tensor(learner.components_), penalty)


def our_semi_nmf(rows: torch.Tensor, k: int) -> float:
    """Ours."""
    return SemiNMF(k, center=False).fit(rows).objective_history_[-1]


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
        return 2 * priced(rows, codes.detach(), atoms.detach(), 0.0)

    return run


def our_kmeans(rows: torch.Tensor, k: int) -> float:
    """Ours, four starts."""
    return KMeans(k, center=False, n_init=4).fit(rows).inertia_


def their_kmeans(rows: torch.Tensor, k: int) -> float:
    """scikit-learn's, four starts."""
    return float(sklearn.cluster.KMeans(k, n_init=4, random_state=0).fit(rows.numpy()).inertia_)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["2000x1024", "4000x4096"], help="rows x width")
    parser.add_argument("--groups", nargs="+", default=["dictionary", "semi-NMF", "k-means"])
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    groups: dict[str, dict[str, Method]] = {
        "dictionary": {"ours": our_dictionary, "scikit-learn": their_dictionary},
        "semi-NMF": {"ours": our_semi_nmf},
        "k-means": {"ours": our_kmeans, "scikit-learn": their_kmeans},
    }
    rival = overcomplete()
    if rival is not None:
        groups["semi-NMF"]["overcomplete"] = rival
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {options.threads} thread(s), "
        f"Python {platform.python_version()}, torch {version('torch')}, scikit-learn {version('scikit-learn')}; "
        f"k = {options.k}, medians of {options.repeats}\n"
    )
    print("| rows | method | seconds | time / ours | objective / ours |\n|---|---|---|---|---|")
    for size in options.sizes:
        n, d = map(int, size.split("x"))
        rows = planted(n, d, options.k)
        for group in options.groups:
            methods = groups[group]
            seconds: dict[str, list[float]] = {name: [] for name in methods}
            ends: dict[str, float] = {}
            for _ in range(options.repeats):
                for name, method in methods.items():
                    started = time.perf_counter()
                    ends[name] = method(rows, options.k)
                    seconds[name].append(time.perf_counter() - started)
            first = np.median(seconds["ours"])
            for name, times in seconds.items():
                middle = np.median(times)
                print(
                    f"| {size} | {group}: {name} | {middle:.2f} | {middle / first:.2f} | "
                    f"{ends[name] / ends['ours']:.5f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
