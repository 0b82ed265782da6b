"""The store gives back what was put in, in the order of the data set, as a whole and in part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.store import ActivationStore
from hooked_mm.store_format import ROW_COLUMNS
from hooked_mm.store_writer import StoreWriter
from tests.stores import MADE_BY, sample, write


@pytest.mark.parametrize("rows_per_shard", [1, 4, 1000])
def test_round_trip(tmp_path: Path, rows_per_shard: int) -> None:
    """Values, dtypes, rows and samples come back in order, however many parts they lie in."""
    store = write(tmp_path / "store", range(9), rows_per_shard=rows_per_shard)
    assert len(list((tmp_path / "store" / "shards").iterdir())) == {1: 6, 4: 2, 1000: 1}[rows_per_shard]
    store = ActivationStore.open(tmp_path / "store")
    expected = [sample(number) for number in range(9)]
    for hook, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        whole = torch.cat([one["values"][hook] for one in expected])
        assert store.activations(hook).dtype == dtype
        assert torch.equal(store.activations(hook), whole)
    assert store.rows.select(ROW_COLUMNS).to_pylist() == [row for one in expected for row in one["rows"]]
    assert store.samples.drop_columns("sample_number").to_pylist() == [
        row for one in expected for row in one["samples"]
    ]
    assert store.hooks == ["a", "b"]
    assert len(store) == 9
    assert store.made_by == {**MADE_BY, "words": ["red", "blue"]}
    assert "9 rows of 9 samples" in repr(store)


@given(st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=12), st.integers(1, 9))
def test_row_samples_point_at_their_sample(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], rows_per_shard: int
) -> None:
    """For every row the index leads to the sample that the row names, across parts."""
    writer = StoreWriter(tmp_path_factory.mktemp("any") / "store", {}, rows_per_shard=rows_per_shard)
    for number in numbers:
        writer.add(**sample(number))
    writer.close()
    store = ActivationStore.open(writer.path)
    names = store.samples.column("sample").to_pylist()
    assert names == [f"s{number}" for number in numbers]
    assert [names[index] for index in store.row_samples()] == store.rows.column("sample").to_pylist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every floating dtype comes back as it was, bit for bit."""
    value = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows = [{"sample": "x"}] * 5
    store = ActivationStore.from_arrays(tmp_path / "s", {"h": value}, rows, [{"sample": "x"}], {})
    assert store.activations("h").dtype == dtype
    assert torch.equal(store.activations("h"), value)


def test_from_arrays_takes_numpy(tmp_path: Path) -> None:
    """Arrays made elsewhere make a finished store; row columns that are not given are null."""
    value = np.arange(6.0).reshape(3, 2)
    rows = [{"sample": "x", "word": "red"}, {"sample": "y"}, {"sample": "x", "position": 4}]
    store = ActivationStore.from_arrays(
        tmp_path / "s",
        {"h": value},
        rows,
        [{"sample": "x", "place": "sea"}, {"sample": "y", "place": "snow"}],
        {"k": 1},
    )
    assert np.array_equal(store.activations("h").numpy(), value)
    assert store.rows.column("position").to_pylist() == [None, None, 4]
    assert store.row_samples().tolist() == [0, 1, 0]
    assert store.samples.column("place").to_pylist() == ["sea", "snow"]
    assert store.made_by == {"k": 1}


def test_an_empty_store_has_its_columns(tmp_path: Path) -> None:
    """A store without a single sample opens, with empty tables of the documented columns."""
    StoreWriter(tmp_path / "s", {}).close()
    store = ActivationStore.open(tmp_path / "s")
    assert len(store) == 0
    assert store.rows.column_names == [*ROW_COLUMNS, "shard", "row"]
    assert store.skipped.column_names == ["sample", "reason"]


def test_unknown_hooks_are_refused_with_the_nearest(tmp_path: Path) -> None:
    """The error names what the store holds."""
    hook = "blocks.3.hook_resid_post"
    store = ActivationStore.from_arrays(
        tmp_path / "s", {hook: np.ones((1, 2))}, [{"sample": "x"}], [{"sample": "x"}], {}
    )
    with pytest.raises(UnknownHookError, match=f"nearest: {hook}"):
        store.activations("blocks.3.hook_resid_pos")


def many(path: Path, order: list[int], rows_per_shard: int = 4) -> ActivationStore:
    """Samples by their numbers, in any order of writing, by two processes in turn."""
    writers = [StoreWriter(path, MADE_BY, rank=rank, rows_per_shard=rows_per_shard) for rank in (0, 1)]
    for place, number in enumerate(order):
        one = sample(number)
        one["samples"][0] |= {"sample_number": number, "place": "sea" if number % 2 else "snow"}
        writers[place % 2].add(**one)
    for writer in reversed(writers):
        writer.close()
    return ActivationStore.open(path)


@given(st.permutations(range(9)), st.integers(1, 9))
def test_rows_stand_in_the_order_of_the_data_set(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], rows_per_shard: int
) -> None:
    """Whoever wrote them, in whatever order and shards."""
    store = many(tmp_path_factory.mktemp("any") / "store", order, rows_per_shard)
    expected = [sample(number) for number in range(9)]
    assert store.samples.column("sample").to_pylist() == [f"s{number}" for number in range(9)]
    rows = [row for one in expected for row in one["rows"]]
    assert store.rows.select(ROW_COLUMNS).to_pylist() == rows
    for hook in ("a", "b"):
        assert torch.equal(store.activations(hook), torch.cat([one["values"][hook] for one in expected]))


def test_where(tmp_path: Path) -> None:
    """Columns of rows and of samples, one value or several, items of lists; parts of parts; nothing left."""
    store = many(tmp_path / "s", list(range(9)))
    numbers = np.array([number for number in range(9) for _ in range(number % 3)])
    words = np.array([row for number in range(9) for row in range(number % 3)])
    whole = store.activations("a")
    for part, kept in (
        (store.where(word="w1"), words == 1),
        (store.where(word=["w0", "w1"]), words >= 0),
        (store.where(place="sea"), numbers % 2 == 1),
        (store.where(place="sea", word="w0"), (numbers % 2 == 1) & (words == 0)),
        (store.where(place="sea").where(word="w0"), (numbers % 2 == 1) & (words == 0)),
        (store.where(sample=["s4", "s5"]), (numbers == 4) | (numbers == 5)),
        (store.where(colours="red"), numbers >= 0),
        (store.where(word="no such word"), words < 0),
    ):
        assert len(part) == kept.sum()
        assert torch.equal(part.activations("a"), whole[torch.from_numpy(kept)])
        names = part.samples.column("sample").to_pylist()
        assert [names[row] for row in part.row_samples()] == [f"s{number}" for number in numbers[kept]]
    assert store.where(place="sea").samples.num_rows == 4
    assert store.where(word="w1").samples.num_rows == 9
    assert len(store) == 9
    with pytest.raises(BadInputError, match=r"no column 'plase'; nearest: place"):
        store.where(plase="sea")


@pytest.mark.parametrize("seed", [None, 3])
def test_batches(tmp_path: Path, seed: int | None) -> None:
    """Every row once, in the store's order or another one that the seed decides; several hooks side by side."""
    store = many(tmp_path / "s", list(range(9))).where(place="snow")
    order = []
    for rows, values in store.batches(["a", "b"], 2, seed=seed):
        assert 1 <= len(rows) <= 2
        for hook, value in values.items():
            assert torch.equal(value, store.activations(hook)[rows])
        order += rows.tolist()
    assert sorted(order) == list(range(len(store)))
    assert (order == sorted(order)) == (seed is None)
    again = [row for rows, _ in store.batches("a", 4, seed=seed) for row in rows]
    assert again == order


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """A few rows of a store that is 40 MB large take no such memory."""
    values = torch.arange(10_000_000, dtype=torch.float32).reshape(-1, 1000)
    rows = [{"sample": "x"}] * len(values)
    store = ActivationStore.from_arrays(tmp_path / "s", {"h": values}, rows, [{"sample": "x"}], {})
    before = _resident()
    got = store.activations("h", np.array([9_999, 17]))
    assert _resident() - before < 10_000_000
    assert torch.equal(got, values[[9_999, 17]])


def _resident() -> int:
    """Bytes of memory that are this process's own, without files that are mapped."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])
