"""`hooked-mm store`: what is printed is what is there, every fault is found, merging loses nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_mm.errors import StoreError
from hooked_mm.store import ActivationStore
from hooked_mm.store_command import faults, main, merge
from hooked_mm.store_format import ROW_COLUMNS, list_files, read_manifest, write_manifest
from hooked_mm.store_writer import StoreWriter

MADE_BY = {"model": "m", "hooks": ["a"]}


def write(path: Path, numbers: range, data: str = "x", **made_by: str) -> Path:
    """A complete store: sample n has n % 3 rows of value n, two samples per shard; sample 100 + first is skipped."""
    writer = StoreWriter(path, {**MADE_BY, "data": data, **made_by})
    for place, number in enumerate(numbers):
        rows = [{"sample": f"s{number}", "position": row, "word": "red"} for row in range(number % 3)]
        sample = {"sample": f"s{number}", "sample_number": place, "text": f"text {number}"}
        writer.add({"a": torch.full((len(rows), 2), float(number))}, rows, [sample])
        if place % 2:
            writer.flush()
    writer.add({}, [], [], [{"sample": f"s{100 + numbers[0]}", "reason": "no such file"}])
    writer.close()
    return path


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, hooks with their shapes, columns, how it was made, skips."""
    main(["info", str(write(tmp_path / "s", range(9)))])
    printed = capsys.readouterr().out
    for part in (
        "9 rows of 9 samples",
        "complete, 5 shards",
        "a: 9 x 2, float32",
        "word: red 9",
        "sample, sample_number, text",
    ):
        assert part in printed
    assert "model: m" in printed
    assert "1 x no such file" in printed
    StoreWriter(tmp_path / "half", MADE_BY)
    main(["info", str(tmp_path / "half")])
    assert "UNFINISHED" in capsys.readouterr().out


def test_a_whole_store_is_called_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No fault is made up."""
    main(["verify", str(write(tmp_path / "s", range(9)))])
    assert capsys.readouterr().out.endswith("whole\n")


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def damage(shard: Path) -> None:
        file = shard / "activations.safetensors"
        save_file(change(load_file(file)), file)

    return damage


def _table(name: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def damage(shard: Path) -> None:
        pq.write_table(change(pq.read_table(shard / f"{name}.parquet")), shard / f"{name}.parquet")

    return damage


FAULTS: dict[str, Callable[[Path], None]] = {
    "values that are not finite": _tensors(lambda t: {"a": torch.full_like(t["a"], torch.nan)}),
    "a has 1 rows, the table 2": _tensors(lambda t: {"a": t["a"][:1].clone()}),
    "other shards": _tensors(lambda t: {**t, "b": t["a"].clone()}),
    "have rows but stand in no table": _table("samples", lambda t: t.slice(1, 1)),
    "more than once": lambda shard: shutil.copytree(shard, shard.with_name("900-00000")) and None,
    "the manifest does not know": lambda shard: shutil.copytree(shard, shard.with_name("900-00000")) and None,
    "can't be read": lambda shard: (shard / "rows.parquet").write_bytes(b"PAR1") and None,
    "the activations can't be read": lambda shard: (shard / "activations.safetensors").write_bytes(b"x" * 9) and None,
    "should have": lambda shard: (shard / "skipped.parquet").unlink(),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_every_fault_is_found(tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the sizes of all files are as the manifest says."""
    path = write(tmp_path / "s", range(9))
    FAULTS[fault](path / "shards" / "000-00001")
    if fault not in ("should have", "the manifest does not know"):
        write_manifest(path, read_manifest(path)["made_by"], list_files(path))
    assert any(fault in found for found in faults(path))
    with pytest.raises(SystemExit):
        main(["verify", str(path)])
    assert fault in capsys.readouterr().out


def test_an_unfinished_store_is_no_whole_one(tmp_path: Path) -> None:
    """It says what to do."""
    StoreWriter(tmp_path / "s", MADE_BY)
    assert faults(tmp_path / "s") == ["it is unfinished: run the extraction again with --resume"]


def test_merged_stores_hold_what_the_parts_held(tmp_path: Path) -> None:
    """Rows, samples and skips of all, those of the first part first; the parts are left as they are."""
    parts = [write(tmp_path / "one", range(5), "x"), write(tmp_path / "two", range(5, 12), "y")]
    before = [list_files(part) for part in parts]
    main(["merge", str(tmp_path / "all"), f"[{parts[0]},{parts[1]}]"])
    whole, stores = ActivationStore.open(tmp_path / "all"), [ActivationStore.open(part) for part in parts]
    rows = [row for store in stores for row in store.rows.select(ROW_COLUMNS).to_pylist()]
    assert whole.rows.select(ROW_COLUMNS).to_pylist() == rows
    assert torch.equal(whole.activations("a"), torch.cat([store.activations("a") for store in stores]))
    assert whole.samples.column("text").to_pylist() == [f"text {number}" for number in range(12)]
    assert whole.samples.column("sample_number").to_pylist() == list(range(12))
    assert sorted(whole.skipped.column("sample").to_pylist()) == ["s100", "s105"]
    assert whole.made_by == {**MADE_BY, "data": {"merged": ["x", "y"]}}
    assert faults(tmp_path / "all") == []
    assert [list_files(part) for part in parts] == before


def test_what_can_not_be_merged_is_refused(tmp_path: Path) -> None:
    """Other makings, common samples and single stores, before anything is written."""
    one, two = write(tmp_path / "one", range(5)), write(tmp_path / "two", range(4, 8))
    other = write(tmp_path / "other", range(20, 22), model="n")
    with pytest.raises(StoreError, match="'s4' is in"):
        merge(tmp_path / "all", [one, two])
    with pytest.raises(StoreError, match=r"\(model differ\)"):
        merge(tmp_path / "all", [one, other])
    with pytest.raises(StoreError, match="at least two stores; got 1"):
        merge(tmp_path / "all", [one])
    assert not (tmp_path / "all").exists()
