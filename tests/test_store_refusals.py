"""What the store refuses, and that it says why: folders, settings, damage and values that do not belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_mm.errors import StoreError, UnknownHookError
from hooked_mm.store import ActivationStore
from hooked_mm.store_writer import StoreWriter
from tests.test_store import MADE_BY, sample, write


def unfinished(path: Path, made_by: Mapping[str, Any] = MADE_BY) -> None:
    """A store with one part that nobody closed."""
    writer = StoreWriter(path, made_by)
    writer.add(**sample(2))
    writer.flush()


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


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    """A store is not continued with other settings; the error names those that differ and no others."""
    unfinished(tmp_path / "s")
    with pytest.raises(StoreError, match=r"\(extra, model, seed differ\)"):
        StoreWriter(
            tmp_path / "s", {"model": "x", "hooks": ["a", "b"], "extra": 1, "words": ["red", "blue"]}, resume=True
        )
    assert StoreWriter(tmp_path / "s", MADE_BY, resume=True).done() == {"s2"}


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


def test_unknown_hooks_are_refused_with_the_nearest(tmp_path: Path) -> None:
    """The error names what the store holds."""
    hook = "blocks.3.hook_resid_post"
    store = ActivationStore.from_arrays(
        tmp_path / "s", {hook: np.ones((1, 2))}, [{"sample": "x"}], [{"sample": "x"}], {}
    )
    with pytest.raises(UnknownHookError, match=f"nearest: {hook}"):
        store.activations("blocks.3.hook_resid_pos")


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
