"""Whatever cuts writing short, shards are whole or not there; what does not fit is refused."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hooked_mm.errors import StoreError
from hooked_mm.store import ActivationStore
from hooked_mm.store_writer import StoreWriter
from tests.stores import MADE_BY, contents, sample, unfinished, write


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
    from tests.stores import MADE_BY, sample
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


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    """A store is not continued with other settings; the error names those that differ and no others."""
    unfinished(tmp_path / "s")
    with pytest.raises(StoreError, match=r"\(extra, model, seed differ\)"):
        StoreWriter(
            tmp_path / "s", {"model": "x", "hooks": ["a", "b"], "extra": 1, "words": ["red", "blue"]}, resume=True
        )
    assert StoreWriter(tmp_path / "s", MADE_BY, resume=True).done() == {"s2"}


X, Y = {"sample": "x"}, {"sample": "y"}


@pytest.mark.parametrize(
    "calls",
    [
        [({"a": torch.ones(2, 3)}, [X], [X])],
        [({"a": torch.ones(1, 3), "b": torch.ones(1, 3)}, [X], [X]), ({"a": torch.ones(1, 3)}, [Y], [Y])],
        [({"a": torch.ones(1, 3)}, [X], [])],
        [({"a": torch.ones(1, 3)}, [Y], [X])],
        [({}, [X], [X])],
    ],
    ids=[
        "a value too many",
        "a hook left out",
        "a row without samples",
        "a row of another sample",
        "rows without values",
    ],
)
def test_misaligned_values_are_refused(tmp_path: Path, calls: list[tuple[dict[str, Tensor], list, list]]) -> None:
    """Values, rows and samples that do not belong together never become a store."""

    def attempt() -> None:
        writer = StoreWriter(tmp_path / "s", {})
        for call in calls:
            writer.add(*call)
        writer.close()

    with pytest.raises(StoreError):
        attempt()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """Another writer is refused while the first lives; its death, however it comes, lets others in."""
    first = StoreWriter(tmp_path / "s", MADE_BY)
    with pytest.raises(StoreError, match="is being written by another run"):
        StoreWriter(tmp_path / "s", MADE_BY, resume=True)
    first.add(**sample(2))
    first.release()
    second = StoreWriter(tmp_path / "s", MADE_BY, resume=True)
    assert second.done() == set()
    second.close()
    assert not (tmp_path / "s" / ".lock").exists()


@pytest.mark.parametrize("limits", [{"rows_per_shard": 4}, {"megabytes_per_shard": 100e-6}, {"seconds_per_shard": 0}])
def test_shards_are_written_as_they_fill(tmp_path: Path, limits: dict[str, float]) -> None:
    """By rows, by size or by time, whichever comes first; nothing waits for the end."""
    writer = StoreWriter(tmp_path / "s", MADE_BY, **limits)  # type: ignore[arg-type]
    written = []
    for number in range(6):
        writer.add(**sample(number))
        written.append(len(list((tmp_path / "s" / "shards").iterdir())))
    # Samples 1, 2, 4, 5 have 1, 2, 1, 2 rows of 16 + 4 bytes, of which five make 100.
    expected = {"rows_per_shard": [0, 0, 0, 0, 1, 1], "megabytes_per_shard": [0, 0, 0, 0, 0, 1]}
    assert written == expected.get(next(iter(limits)), [1, 2, 3, 4, 5, 6])


def test_processes_write_shards_of_their_own(tmp_path: Path) -> None:
    """Also when a process goes on where another of its number was killed."""
    for session in range(2):
        writers = [StoreWriter(tmp_path / "s", MADE_BY, resume=bool(session), rank=rank) for rank in range(3)]
        for writer in writers:
            writer.add(**sample(3 * writer.rank + session))
            writer.flush()
        writers[0].release()
    names = sorted(shard.name for shard in (tmp_path / "s" / "shards").iterdir())
    assert names == [f"{rank:03d}-{number:05d}" for rank in range(3) for number in range(2)]
