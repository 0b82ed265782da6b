"""Nearest neighbours and duplicates against all float64 differences, where float32 products are good and where not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analyses import neighbours
from analyses.neighbours import distinct, nearest
from hooked_mm.errors import BadInputError


def by_differences(rows: Tensor, k: int) -> Tensor:
    """Distances to the k nearest others, (n, k)."""
    wide = rows.double()
    apart = (wide[:, None] - wide).norm(dim=2)
    return apart.fill_diagonal_(torch.inf).topk(k, largest=False).values


def drawn(n: int, d: int, seed: int = 0) -> Tensor:
    """Normal rows."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


class Read:
    """Rows that can only be read a piece at a time."""

    def __init__(self, rows: Tensor, most: int) -> None:
        self.rows, self.most = rows, most

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        part = self.rows[index]
        assert len(part) <= self.most
        return part


HARD = {
    "normal": drawn(300, 40),
    "bfloat16": drawn(300, 40).bfloat16(),
    "far from zero": drawn(300, 40) + 1e4,
    "some very far": torch.cat([1e-3 * drawn(250, 40), 1e-3 * drawn(50, 40, 1) + torch.eye(40)[0] * 1e4]),
    "many equally near": torch.randint(0, 3, (300, 5), generator=torch.Generator().manual_seed(0)).float(),
    "large": drawn(100, 8).double() * 1e100,
    "small": drawn(100, 8).double() * 1e-100,
    "all the same": torch.ones(50, 3),
    "few": drawn(4, 3),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("block", [2048, 37])
def test_distances_are_exact(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last digits of float64, whatever float32 products make of them, in one block or many."""
    monkeypatch.setattr(neighbours, "BLOCK", block)
    rows = HARD[name]
    found = nearest(rows, 3)
    torch.testing.assert_close(found.distances, by_differences(rows, 3), rtol=1e-13, atol=0)
    here = rows.double()[torch.arange(len(rows))[:, None]]
    torch.testing.assert_close((rows.double()[found.indices] - here).norm(dim=2), found.distances, rtol=1e-13, atol=0)
    assert not bool((found.indices == torch.arange(len(rows))[:, None]).any())
    assert all(len(set(row)) == 3 for row in found.indices.tolist())
    if name in ("some very far", "many equally near"):
        assert found.widened > len(rows) / 3
    if name in ("normal", "far from zero", "few"):
        assert found.widened == 0


@given(n=st.integers(3, 40), d=st.integers(1, 6), k=st.integers(1, 5), seed=st.integers(0, 99), whole=st.booleans())
def test_any_rows(n: int, d: int, k: int, seed: int, whole: bool) -> None:
    """With ties and copies among them."""
    rows = drawn(n, d, seed).mul(2).round() if whole else drawn(n, d, seed)
    k = min(k, n - 1)
    torch.testing.assert_close(nearest(rows, k).distances, by_differences(rows, k), rtol=1e-13, atol=0)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarser_products_change_nothing(precision: str) -> None:
    """Where torch is told to multiply in TF32 or bfloat16, bounds are wider, answers the same."""
    rows, before = drawn(400, 30), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        found = nearest(rows, 2)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found.distances, by_differences(rows, 2), rtol=1e-13, atol=0)


def test_rows_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never all of them."""
    monkeypatch.setattr(neighbours, "BLOCK", 32)
    monkeypatch.setattr(neighbours, "EXACT_NUMBERS", 500)
    rows = drawn(150, 10)
    rows[140] = rows[3]
    found = nearest(Read(rows, 60), 2)
    torch.testing.assert_close(found.distances, by_differences(rows, 2), rtol=1e-13, atol=0)
    assert distinct(Read(rows, 32)).kept.tolist() == [row for row in range(150) if row != 140]


def test_duplicates_are_found_exactly_and_counted() -> None:
    """Copies wherever they are, -0 as 0, in every precision; a last digit makes a difference; the first one stays."""
    rows = drawn(1000, 20)
    copied = torch.cat([rows, rows[[5, 5, 17]], rows[:1]])
    copied = copied[torch.randperm(1004, generator=torch.Generator().manual_seed(1))]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = distinct(copied.to(dtype))
        assert found.duplicates == 4
        assert found.kept.tolist() == first_of_each(copied.to(dtype))
    nearly = torch.cat([rows, rows[:50]])
    nearly[1000:, 3] = torch.nextafter(nearly[1000:, 3], torch.tensor(torch.inf))
    assert distinct(nearly).duplicates == 0
    zeros = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, 2.0]])
    assert distinct(zeros).kept.tolist() == [0, 2]
    assert distinct(torch.ones(7, 3) * 1e6).kept.tolist() == [0]
    assert distinct(rows + 1e7).duplicates == len(rows) - len((rows + 1e7).unique(dim=0))


def first_of_each(rows: Tensor) -> list[int]:
    """Indices of rows that none before is equal to."""
    seen: set[tuple[float, ...]] = set()
    return [index for index, row in enumerate(rows.tolist()) if not (tuple(row) in seen or seen.add(tuple(row)))]


@given(seed=st.integers(0, 99), copies=st.integers(0, 30), decimals=st.integers(0, 2))
def test_distinct_rows_are_those_of_a_set(seed: int, copies: int, decimals: int) -> None:
    """Coarse numbers, so that many are the same by chance."""
    rows = drawn(40, 2, seed).round(decimals=decimals)
    rows = torch.cat([rows, rows[:copies]])
    found = distinct(rows)
    assert found.kept.tolist() == first_of_each(rows)
    assert found.duplicates == len(rows) - len(found.kept)


def test_nearly_equal_rows_by_tolerance() -> None:
    """What one token in one context is in other batches, at 1e-6 of the norm: equal if asked for, else not."""
    rows = drawn(300, 30)
    first = rows[:1] + 1e-6 * drawn(100, 30, 2)
    both = torch.cat([rows, first])
    assert distinct(both).duplicates == 0
    found = distinct(both, tolerance=1e-5)
    assert found.kept.tolist() == list(range(300))
    assert found.duplicates == 100
    left = by_differences(both[distinct(both, tolerance=1.0).kept], 1)
    size = float((both.double() - both.double().mean(0)).norm(dim=1).mean())
    assert float(left.min()) > size


def test_refusals() -> None:
    """No rows, k out of range, a negative tolerance, values that are not finite."""
    rows = drawn(5, 3)
    for wrong in (
        lambda: nearest(rows, 5),
        lambda: nearest(rows, 0),
        lambda: nearest(rows.where(rows < rows.max(), torch.nan)),
        lambda: distinct(rows.where(rows < rows.max(), torch.inf)),
        lambda: distinct(rows[:0]),
        lambda: distinct(rows, -1.0),
    ):
        with pytest.raises(BadInputError):
            wrong()
