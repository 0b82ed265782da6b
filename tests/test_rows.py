"""Rows of a tensor and of a store, in one process and in several: the same sums, the same draws, the same fits."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.base import clone

from concept_dict import rows as rows_module
from concept_dict.dictionary import METHODS
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.rows import Found, Rows
from concept_dict.top_k_sae import TopKSAE
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.store import ActivationStore
from tests.processes import run_in_processes


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


SHARES = {1: [0, 300], 2: [0, 90, 300], 3: [0, 170, 170, 300]}
"""Where each process's rows end, by how many there are: shares of different sizes, one of three empty."""


FITTED = {
    **{name: method(6) for name, method in METHODS.items()},
    "NonNegativeDictionary": NonNegativeDictionary(6, max_iter=40),
    "whitened": NonNegativeDictionary(6, max_iter=40, whiten=0.5),
    "TopKSAE": TopKSAE(6, max_iter=40),
}
"""Few passes: processes that go different ways differ by then."""


def fit(rank: int, size: int, rows: torch.Tensor, folder: Path) -> None:
    """Fit every method as one of several processes."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    mine = rows[SHARES[size][rank] : SHARES[size][rank + 1]]
    for name, made in FITTED.items():
        made = clone(made)
        active = made.fit_transform(Rows(lambda index: mine[index], len(mine), mine.shape[1], "cpu"))
        assert active.shape == (len(mine), 6)
        found = {"C": made.components_, "error": made.reconstruction_err_, "mean": made.mean_}
        torch.save(found, folder / f"{name}-{size}-{rank}.pt")


@pytest.fixture(scope="module")
def planted_rows() -> torch.Tensor:
    """Sparse codes of six concepts, with noise."""
    rng = np.random.default_rng(0)
    codes = rng.gamma(2.0, 1.0, (300, 6)) * (rng.random((300, 6)) < 0.3)
    return torch.as_tensor(codes @ rng.standard_normal((6, 16)) + 0.1 * rng.standard_normal((300, 16))).float()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def fits(request: pytest.FixtureRequest, planted_rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method fitted to the same rows by this process alone, and by several."""
    folder = tmp_path_factory.mktemp(f"fits{request.param}")
    fit(0, 1, planted_rows, folder)
    run_in_processes(fit, request.param, planted_rows, folder)
    return folder


@pytest.mark.parametrize("name", FITTED)
def test_any_number_of_processes_fits_the_same(fits: Path, name: str) -> None:
    """Concepts within 1e-4 after matching, error within 1e-6; the autoencoder, whose batches differ, nearly as good."""
    alone = torch.load(fits / f"{name}-1-0.pt")
    shares = [torch.load(file) for file in sorted(fits.glob(f"{name}-[23]-*.pt"))]
    assert len(shares) > 1
    for share in shares:
        assert torch.equal(share["C"], shares[0]["C"])
        torch.testing.assert_close(share["mean"], alone["mean"], rtol=1e-6, atol=1e-6)
        if name == "TopKSAE":
            assert share["error"] == pytest.approx(alone["error"], rel=0.25)
            continue
        assert share["error"] == pytest.approx(alone["error"], rel=1e-6)
        order = linear_sum_assignment(-(alone["C"] @ share["C"].T).numpy())[1]
        assert (alone["C"] - share["C"][order]).abs().max() <= 1e-4
