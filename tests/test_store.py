"""The store gives back what was put in, whatever cut its making short; `test_store_refusals` has what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hooked_mm.errors import StoreError
from hooked_mm.store import ActivationStore
from hooked_mm.store_format import ROW_COLUMNS
from hooked_mm.store_writer import StoreWriter

MADE_BY = {"model": "small", "hooks": ["a", "b"], "seed": 3, "words": ("red", "blue")}


def sample(number: int) -> dict[str, Any]:
    """One call of `StoreWriter.add`: sample `number` with `number % 3` rows, all numbers told by it."""
    rows = number % 3
    base = torch.arange(rows * 4, dtype=torch.float32).reshape(rows, 4) + 100 * number
    name = f"s{number}"
    return {
        "values": {"a": base, "b": (-base[:, :2]).bfloat16()},
        "rows": [
            {"sample": name, "position": row, "modality": "text", "role": "answer", "word": f"w{row}"}
            for row in range(rows)
        ],
        "samples": [{"sample": name, "text": f"text {number}", "colours": ["red"] * rows}],
    }


def contents(store: ActivationStore) -> Counter[tuple]:
    """The multiset of rows with their values."""
    a, b = store.activations("a").tolist(), store.activations("b").float().tolist()
    rows = store.rows.select(ROW_COLUMNS).to_pylist()
    assert len(rows) == len(a) == len(b)
    return Counter((*row.values(), *x, *y) for row, x, y in zip(rows, a, b, strict=True))


def write(path: Path, numbers: range, **options: Any) -> ActivationStore:
    """A store of these samples."""
    writer = StoreWriter(path, MADE_BY, **options)
    for number in numbers:
        if f"s{number}" not in writer.done():
            writer.add(**sample(number))
    writer.close()
    return ActivationStore.open(path)


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
    assert store.samples.drop_columns("index").to_pylist() == [row for one in expected for row in one["samples"]]
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


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    """Other programs can read it: JSON, Parquet and safetensors under the documented names, no pickle anywhere."""
    write(tmp_path / "store", range(5), rows_per_shard=4)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".parquet", ".safetensors"}
    heads = {path: path.read_bytes()[:4] for path in files}
    for path, head in heads.items():
        assert not head.startswith((b"\x80", b"PK", b"\x93NUM")), f"{path} looks like a pickle, a zip or an npy file"
    part = tmp_path / "store" / "shards" / "000-00000"
    assert sorted(path.name for path in part.iterdir()) == [
        "activations.safetensors",
        "rows.parquet",
        "samples.parquet",
        "skipped.parquet",
    ]
    assert load_file(part / "activations.safetensors")["a"].shape == (pq.read_table(part / "rows.parquet").num_rows, 4)
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["complete"] is True


def test_skipped_samples_are_listed(tmp_path: Path) -> None:
    """Skipped samples stand in a table with the reason, also where a part has nothing else, and count as done."""
    writer = StoreWriter(tmp_path / "s", {})
    writer.add({}, [], [], [{"sample": "bad", "reason": "no such file"}])
    writer.flush()
    writer.add(**sample(2), skipped=[{"sample": "worse", "reason": "cut off"}])
    writer.flush()
    assert writer.done() == {"bad", "s2", "worse"}
    writer.close()
    store = ActivationStore.open(writer.path)
    expected = [{"sample": "bad", "reason": "no such file"}, {"sample": "worse", "reason": "cut off"}]
    assert store.skipped.to_pylist() == expected
    assert len(store) == 2
    assert "2 skipped" in repr(store)


def test_resuming_after_a_kill_between_parts(tmp_path: Path) -> None:
    """A run cut off after some parts keeps them, byte for byte, and ends with the rows of an uninterrupted run."""
    whole = write(tmp_path / "whole", range(12), rows_per_shard=3)
    writer = StoreWriter(tmp_path / "cut", MADE_BY, rows_per_shard=3)
    for number in range(7):
        writer.add(**sample(number))
    del writer  # what was added since the last part is lost
    before = {path: path.read_bytes() for path in (tmp_path / "cut" / "shards").rglob("*") if path.is_file()}
    assert before
    resumed = write(tmp_path / "cut", range(12), resume=True, rows_per_shard=3)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert contents(resumed) == contents(whole)
    assert sorted(resumed.samples.column("sample").to_pylist()) == sorted(whole.samples.column("sample").to_pylist())


def test_resuming_after_a_kill_within_a_part(tmp_path: Path) -> None:
    """A half-written part is never read, and thrown away on resuming."""
    whole = write(tmp_path / "whole", range(9), rows_per_shard=3)
    writer = StoreWriter(tmp_path / "cut", MADE_BY, rows_per_shard=3)
    for number in range(3):
        writer.add(**sample(number))
    writer.release()
    aside = tmp_path / "cut" / "shards" / ".000-00001"
    shutil.copytree(tmp_path / "cut" / "shards" / "000-00000", aside)
    (aside / "rows.parquet").unlink()
    (aside / "activations.safetensors").write_bytes(b"half")
    partial = ActivationStore.open(tmp_path / "cut", partial=True)
    assert partial.samples.column("sample").to_pylist() == ["s0", "s1", "s2"]
    assert contents(partial) <= contents(whole)
    assert contents(write(tmp_path / "cut", range(9), resume=True, rows_per_shard=3)) == contents(whole)
    assert not aside.exists()


def test_files_of_the_operating_system_are_no_part(tmp_path: Path) -> None:
    """A file that a file browser leaves behind stops neither reading nor resuming."""
    writer = StoreWriter(tmp_path / "s", MADE_BY, rows_per_shard=3)
    for number in range(3):
        writer.add(**sample(number))
    writer.release()
    (tmp_path / "s" / "shards" / ".DS_Store").write_bytes(b"x")
    assert len(ActivationStore.open(tmp_path / "s", partial=True)) == 3
    assert len(write(tmp_path / "s", range(6), resume=True, rows_per_shard=3)) == 6
    assert len(ActivationStore.open(tmp_path / "s")) == 6


KILLED = """
    import sys, time
    sys.path.insert(0, {root!r})
    import hooked_mm.store_writer as module
    from tests.test_store import MADE_BY, sample
    write_table = module.pq.write_table
    def slow(table, path):
        write_table(table, path)
        if "000-00002" in str(path):
            print("writing", flush=True)
            time.sleep(100)
    module.pq.write_table = slow
    writer = module.StoreWriter({path!r}, MADE_BY, rows_per_shard=3)
    for number in range(12):
        writer.add(**sample(number))
"""


def test_resuming_after_sigkill(tmp_path: Path) -> None:
    """A process killed while it writes its third part leaves two, and a store that is refused until resumed."""
    code = textwrap.dedent(KILLED.format(root=str(Path(__file__).parents[1]), path=str(tmp_path / "cut")))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(StoreError, match="2 shards"):
        ActivationStore.open(tmp_path / "cut")
    assert len(contents(ActivationStore.open(tmp_path / "cut", partial=True))) == 6
    whole = write(tmp_path / "whole", range(12), rows_per_shard=3)
    assert contents(write(tmp_path / "cut", range(12), resume=True, rows_per_shard=3)) == contents(whole)


def test_columns_that_only_some_samples_have(tmp_path: Path) -> None:
    """A column that the first sample lacks is kept, with null for those without it, within a part and across parts."""
    writer = StoreWriter(tmp_path / "s", {})
    for samples in ([{"sample": "x"}, {"sample": "y", "place": "sea"}], [{"sample": "z", "colour": "red"}]):
        writer.add({"a": torch.ones(len(samples), 1)}, [{"sample": one["sample"]} for one in samples], samples)
        writer.flush()
    writer.close()
    table = ActivationStore.open(tmp_path / "s").samples
    assert table.column("place").to_pylist() == [None, "sea", None]
    assert table.column("colour").to_pylist() == [None, None, "red"]


def test_an_empty_store_has_its_columns(tmp_path: Path) -> None:
    """A store without a single sample opens, with empty tables of the documented columns."""
    StoreWriter(tmp_path / "s", {}).close()
    store = ActivationStore.open(tmp_path / "s")
    assert len(store) == 0
    assert store.rows.column_names == [*ROW_COLUMNS, "shard", "row"]
    assert store.skipped.column_names == ["sample", "reason"]
