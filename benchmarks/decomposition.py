"""Our decompositions against scikit-learn and overcomplete: time as a ratio, and the objective each ends at.

`python -m benchmarks.decomposition`. Runs are interleaved and repeated; the table shows medians of seconds and means
of objectives, which are those of the results, in float64. A rival that is not installed is left out (`pip install
--no-deps overcomplete`; its package needs torchvision, its decompositions do not). A rival that would not end within
`--limit` is left out as well: for many rows that is estimated from a tenth of them. Rows are planted sparse codes, or
with `--activations` those of the small LLaVA where it is about to say an attribute word in captions of scenes.

| group | objective |
|---|---|
| dictionary | 1/2 ||Z - A C||^2 + lambda sum(A), A >= 0, ||c_k|| <= 1, from the same concepts |
| semi-NMF | ||Z - A C||^2, A >= 0 |
| k-means | inertia, four starts, another seed in each repeat |
| Lloyd | inertia, from the same centres |
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import tempfile
import time
import types
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import sklearn.cluster
import torch
from sklearn.decomposition import DictionaryLearning
from threadpoolctl import threadpool_limits

from concept_dict.decomposition import unit
from concept_dict.demo import STYLE
from concept_dict.kmeans import KMeans
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.semi_nmf import SemiNMF
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.scenes.language import DESCRIBED, WORD_CLASSES
from hooked_mm.selectors import TokenOfInterest

ALPHA = 0.1
"""Price of activations, relative to the rows' root mean square norm."""

MANY = 50_000
"""From so many rows on, a rival's time is estimated from a tenth of them before it is run."""

Method = Callable[[torch.Tensor, int, int], float]
"""Rows, k and a seed to the objective of the result; what it does is timed."""


def clock() -> float:
    """CPU seconds of this process where it has one thread, so that other work beside counts little."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def planted(n: int, d: int, k: int, seed: int = 0) -> torch.Tensor:
    """Sparse non-negative codes times random unit atoms, with noise; centred float32 rows."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((k, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = rng.exponential(size=(n, k)) * (rng.random((n, k)) < 0.15)
    rows = codes @ atoms + 0.3 / d**0.5 * rng.standard_normal((n, d))
    return torch.tensor(rows - rows.mean(0), dtype=torch.float32)


def activations(scenes: int) -> torch.Tensor:
    """What the small LLaVA's last layer holds where its captions' attribute words are predicted; centred rows."""
    model = HookedMM.small("llava")
    hook = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    words = tuple(word for name in DESCRIBED for word in WORD_CLASSES[name])
    with tempfile.TemporaryDirectory() as folder:
        data = ScenesDataModule(scenes, "caption", "test", 0, STYLE, batch_size=100)
        store = extract(Extractor(model, hook, TokenOfInterest(words, where="predicts")), data, Path(folder) / "rows")
        rows = store.activations(hook).float().clone()
    return rows - rows.mean(0)


def start(rows: torch.Tensor, k: int) -> torch.Tensor:
    """Concepts to begin with: rows drawn by chance."""
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:k]
    return unit(rows[drawn])


def priced(rows: torch.Tensor, codes: torch.Tensor, concepts: torch.Tensor, penalty: float) -> float:
    """1/2 ||Z - A C||^2 + lambda sum(A) in float64."""
    rest = rows.double() - codes.double() @ concepts.double()
    return 0.5 * float(rest.square().sum()) + penalty * float(codes.double().sum())


def our_dictionary(rows: torch.Tensor, k: int, seed: int) -> float:
    """Ours."""
    fitted = NonNegativeDictionary(k, alpha=ALPHA, init=start(rows, k), center=False).fit(rows)
    return fitted.objective_history_[-1] / 2


def their_dictionary(rows: torch.Tensor, k: int, seed: int) -> float:
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


def our_semi_nmf(rows: torch.Tensor, k: int, seed: int) -> float:
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

    def run(rows: torch.Tensor, k: int, seed: int) -> float:
        torch.manual_seed(0)
        codes, atoms = Rival(nb_concepts=k).fit(rows)
        return 2 * priced(rows, codes.detach(), atoms.detach(), 0.0)

    return run


def our_kmeans(rows: torch.Tensor, k: int, seed: int) -> float:
    """Ours, four starts."""
    return KMeans(k, center=False, n_init=4, random_state=seed).fit(rows).inertia_


def their_kmeans(rows: torch.Tensor, k: int, seed: int) -> float:
    """scikit-learn's, four starts."""
    return float(sklearn.cluster.KMeans(k, n_init=4, random_state=seed).fit(rows.numpy()).inertia_)


def our_lloyd(rows: torch.Tensor, k: int, seed: int) -> float:
    """Ours, from given centres."""
    return KMeans(k, center=False, init=start(rows, k)).fit(rows).inertia_


def their_lloyd(rows: torch.Tensor, k: int, seed: int) -> float:
    """scikit-learn's, from given centres."""
    return float(sklearn.cluster.KMeans(k, init=start(rows, k).numpy(), n_init=1).fit(rows.numpy()).inertia_)


def compare(name: str, group: str, methods: dict[str, Method], rows: torch.Tensor, options: argparse.Namespace) -> None:
    """Print a line for each method."""
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    ends: dict[str, list[float]] = {method: [] for method in methods}
    left_out: dict[str, float] = {}
    for seed in range(options.repeats):
        for label, method in methods.items():
            if label != "ours" and label not in left_out and not seed and len(rows) >= MANY:
                started = clock()
                method(rows[::10].clone(), options.k, seed)
                estimate = 10 * (clock() - started)
                if estimate > options.limit:
                    left_out[label] = estimate
            if label in left_out:
                continue
            started = clock()
            ends[label].append(method(rows, options.k, seed))
            seconds[label].append(clock() - started)
    first, end = np.median(seconds["ours"]), np.mean(ends["ours"])
    for label in methods:
        if label in left_out:
            print(f"| {name} | {group}: {label} | not run; about {left_out[label]:.0f} by a tenth of the rows | | |")
            continue
        middle = np.median(seconds[label])
        print(f"| {name} | {group}: {label} | {middle:.2f} | {middle / first:.2f} | {np.mean(ends[label]) / end:.5f} |")
    sys.stdout.flush()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", default=["2000x1024", "4000x4096", "100000x1024"], help="rows x width")
    parser.add_argument("--activations", type=int, default=0, help="scenes whose extracted rows are decomposed besides")
    parser.add_argument("--limit", type=float, default=600, help="seconds within which a rival has to end")
    parser.add_argument("--groups", nargs="+", default=["dictionary", "semi-NMF", "k-means", "Lloyd"])
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)
    groups: dict[str, dict[str, Method]] = {
        "dictionary": {"ours": our_dictionary, "scikit-learn": their_dictionary},
        "semi-NMF": {"ours": our_semi_nmf},
        "k-means": {"ours": our_kmeans, "scikit-learn": their_kmeans},
        "Lloyd": {"ours": our_lloyd, "scikit-learn": their_lloyd},
    }
    rival = overcomplete()
    if rival is not None:
        groups["semi-NMF"]["overcomplete"] = rival
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {options.threads} thread(s), "
        f"Python {platform.python_version()}, torch {version('torch')}, scikit-learn {version('scikit-learn')}; "
        f"k = {options.k}, medians of {options.repeats}\n"
    )
    print("| rows | method | CPU seconds | time / ours | objective / ours |\n|---|---|---|---|---|")
    for size in options.sizes:
        n, d = map(int, size.split("x"))
        rows = planted(n, d, options.k)
        for group in options.groups:
            compare(size, group, groups[group], rows, options)
    if options.activations:
        rows = activations(options.activations)
        for group in options.groups:
            compare(f"{len(rows)}x{rows.shape[1]}, activations", group, groups[group], rows, options)


if __name__ == "__main__":
    main()
