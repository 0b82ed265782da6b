"""The files are the documented ones, and what is no whole store is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from hooked_mm.errors import StoreError
from hooked_mm.store import ActivationStore
from hooked_mm.store_writer import StoreWriter
from tests.stores import MADE_BY, unfinished, write


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


def test_what_is_not_a_finished_store_of_ours_is_refused(tmp_path: Path) -> None:
    """Unfinished, finished, foreign and missing folders: each is refused in its own words, and left as it was."""
    unfinished(tmp_path / "half")
    with pytest.raises(StoreError, match=r"unfinished \(1 shards written\)"):
        ActivationStore.open(tmp_path / "half")
    with pytest.raises(StoreError, match="resume=True"):
        StoreWriter(tmp_path / "half", MADE_BY)
    write(tmp_path / "done", range(3))
    for resume in (True, False):
        with pytest.raises(StoreError, match="already holds a store, which is complete"):
            StoreWriter(tmp_path / "done", MADE_BY, resume=resume)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match="other things"):
        StoreWriter(tmp_path / "photos", MADE_BY, resume=True)
    for name in ("photos", "nowhere"):
        with pytest.raises(StoreError, match="not an activation store"):
            ActivationStore.open(tmp_path / name)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    assert len(ActivationStore.open(tmp_path / "done")) == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '{"format": 1}', '{"complete": true, "made_by": {}}', '{"format": 2, "complete": 0}'],
)
def test_broken_manifests_are_refused(tmp_path: Path, text: str) -> None:
    """Whatever stands in the manifest, what comes is a StoreError that names the file or folder."""
    unfinished(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text(text)
    for attempt in (
        lambda: ActivationStore.open(tmp_path / "s"),
        lambda: StoreWriter(tmp_path / "s", MADE_BY, resume=True),
    ):
        with pytest.raises(StoreError, match=str(tmp_path / "s")):
            attempt()


def test_future_formats_are_refused(tmp_path: Path) -> None:
    """A store of a later version says so."""
    write(tmp_path / "s", range(3))
    file = tmp_path / "s" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(StoreError, match="format 99"):
        ActivationStore.open(tmp_path / "s")


@pytest.mark.parametrize("damage", ["part missing", "file missing", "file cut", "parts missing"])
def test_a_store_copied_by_half_is_refused(tmp_path: Path, damage: str) -> None:
    """A finished store that lost a part or a file on the way is refused, never silently half-read."""
    write(tmp_path / "s", range(9), rows_per_shard=3)
    parts = tmp_path / "s" / "shards"
    file = parts / "000-00001" / "activations.safetensors"
    if damage == "file cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "file missing":
        file.unlink()
    else:
        shutil.rmtree(parts / "000-00001" if damage == "part missing" else parts)
    with pytest.raises(StoreError):
        ActivationStore.open(tmp_path / "s").activations("a")
