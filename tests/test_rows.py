"""Rows of a tensor and of a store, in one process and in several: the same sums, the same draws, the same fits."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from concept_dict import rows as rows_module
from concept_dict.rows import Found, Rows
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.store import ActivationStore

ROOT = Path(__file__).parents[1]


def values(n: int = 40, d: int = 6, seed: int = 0) -> torch.Tensor:
    """Rows that are not centred."""
    return torch.as_tensor(np.random.default_rng(seed).standard_normal((n, d)) + 2).float()


def stored(path: Path, rows: torch.Tensor) -> ActivationStore:
    """A store with one row per sample."""
    samples = [{"sample": f"s{n}", "sample_number": n} for n in range(len(rows))]
    table = [{"sample": f"s{n}"} for n in range(len(rows))]
    return ActivationStore.from_arrays(path, {"h": rows}, table, samples, {"model": "none"})


@given(
    n=st.integers(1, 60),
    chunk=st.integers(1, 70),
    held=st.sampled_from([0, 1e9]),
    center=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_centred(n: int, chunk: int, held: float, center: bool, dtype: torch.dtype) -> None:
    """Mean, size and every row, held or converted again in each pass, as numpy has them; the source stays."""
    source = values(n).to(dtype)
    before = source.clone()
    with mock.patch.object(rows_module, "CHUNK", chunk), mock.patch.object(rows_module, "HELD_BYTES", held):
        found = Rows.of(source).centred(center)
        parts = list(found.chunks())
    wide = source.double().numpy()
    expected = wide - wide.mean(0) * center
    np.testing.assert_allclose(torch.cat([part for _, part in parts]).numpy(), expected, atol=1e-5)
    assert [index for part, _ in parts for index in range(n)[part]] == list(range(n))
    assert found.size == pytest.approx((expected**2).sum(), rel=1e-5, abs=1e-8)
    np.testing.assert_allclose(found.take(torch.tensor([n - 1])).numpy(), expected[[n - 1]], atol=1e-5)
    assert torch.equal(source, before)


def test_rows_of_a_store(tmp_path: Path) -> None:
    """They are the store's, also of a part of it; what is not there or not finite is refused."""
    source = values()
    store = stored(tmp_path / "s", source)
    assert torch.equal(torch.cat([chunk for _, chunk in Rows.of_store(store, "h").chunks()]), source)
    part = Rows.of_store(store.where(sample=["s3", "s30"]), "h")
    assert torch.equal(part.read(slice(None)), source[[3, 30]])
    assert torch.equal(part.read(torch.tensor([1])), source[[30]])
    with pytest.raises(UnknownHookError):
        Rows.of_store(store, "g")
    with pytest.raises(BadInputError, match="no rows"):
        Rows.of_store(store.where(sample="none"), "h")
    source[7, 2] = torch.inf
    with pytest.raises(BadInputError, match="row 7 of 'h'"):
        Rows.of_store(stored(tmp_path / "t", source), "h")


@given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=30), st.floats(0, 0.999))
def test_draws_follow_the_weights(weights: list[float], point: float) -> None:
    """A point finds the row in whose share of the weights it lies."""
    total = np.cumsum(np.array(weights, np.float32).astype(float))
    if total[-1] == 0:
        return
    rows = Rows.of(torch.arange(len(weights)).float()[:, None]).centred(False)
    found = int(rows.draw(torch.tensor(weights), torch.tensor([point], dtype=torch.float64)))
    assert found == min(int(np.searchsorted(total, point * total[-1])), len(weights) - 1)


def test_largest() -> None:
    """In order; no more than there are."""
    rows = Rows.of(values(4)).centred(False)
    worth = torch.tensor([1.0, 5.0, 3.0, 5.0])
    assert rows.largest(worth, 3) == [Found(5.0, 0, 1), Found(5.0, 0, 3), Found(3.0, 0, 2)]
    assert len(rows.largest(worth, 9)) == 4
    assert torch.equal(rows.row(Found(5.0, 0, 3)), rows.take(torch.tensor([3]))[0])


SCRIPT = """
    import sys
    sys.path.insert(0, {root!r})
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp
    from concept_dict.dictionary import METHODS
    from concept_dict.rows import Rows

    def work(rank, size, port, rows, folder):
        torch.set_num_threads(1)
        if size > 1:
            dist.init_process_group("gloo", init_method=f"tcp://localhost:{{port}}", rank=rank, world_size=size)
        # Shares of different sizes, one of them empty where there are three.
        ends = {{1: [0, 300], 2: [0, 90, 300], 3: [0, 170, 170, 300]}}[size]
        mine = rows[ends[rank] : ends[rank + 1]]
        for name, method in METHODS.items():
            made = method(6)
            share = Rows(lambda index, mine=mine: mine[index], len(mine), mine.shape[1], "cpu")
            active = made.fit_transform(share)
            assert active.shape == (len(mine), 6)
            found = {{"C": made.components_, "error": made.reconstruction_err_, "mean": made.mean_}}
            torch.save(found, f"{{folder}}/{{name}}-{{size}}-{{rank}}.pt")

    if __name__ == "__main__":
        folder, port = sys.argv[1], int(sys.argv[2])
        rows = torch.load(f"{{folder}}/rows.pt")
        for size in (1, 2, 3):
            mp.spawn(work, (size, port + size, rows, folder), nprocs=size)
"""


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method fitted by one, two and three processes to the same rows."""
    folder = tmp_path_factory.mktemp("fits")
    rng = np.random.default_rng(0)
    codes = rng.gamma(2.0, 1.0, (300, 6)) * (rng.random((300, 6)) < 0.3)
    torch.save(
        torch.as_tensor(codes @ rng.standard_normal((6, 16)) + 0.1 * rng.standard_normal((300, 16))).float(),
        folder / "rows.pt",
    )
    (folder / "run.py").write_text(textwrap.dedent(SCRIPT.format(root=str(ROOT))))
    port = 20_000 + os.getpid() % 10_000 * 4
    done = subprocess.run(
        [sys.executable, folder / "run.py", folder, str(port)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["SemiNMF", "NonNegativeDictionary", "KMeans", "PCA", "TopNorm", "TopKSAE"])
def test_any_number_of_processes_fits_the_same(fits: Path, name: str) -> None:
    """Concepts within 1e-4 after matching, error within 1e-6; the autoencoder, whose batches differ, nearly as good."""
    alone = torch.load(fits / f"{name}-1-0.pt")
    for size in (2, 3):
        shares = [torch.load(fits / f"{name}-{size}-{rank}.pt") for rank in range(size)]
        for share in shares:
            assert torch.equal(share["C"], shares[0]["C"])
            torch.testing.assert_close(share["mean"], alone["mean"], rtol=1e-6, atol=1e-6)
            if name == "TopKSAE":
                assert share["error"] == pytest.approx(alone["error"], rel=0.25)
                continue
            assert share["error"] == pytest.approx(alone["error"], rel=1e-6)
            order = linear_sum_assignment(-(alone["C"] @ share["C"].T).numpy())[1]
            assert (alone["C"] - share["C"][order]).abs().max() <= 1e-4
