"""The file of a cache: whole or not there, aliases kept once, everything else refused with the reason."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import hooked_mm.cache_file as cache_file
from hooked_mm.batch import Batch, Role
from hooked_mm.cache_file import load_cache, save_cache
from hooked_mm.errors import BadInputError, StoreError
from hooked_mm.hook_points import HookPoint
from hooked_mm.layout import Layout

POINTS = {name: HookPoint(name, "text", 0, "é", once=True, form="heads") for name in "abcd"}


def small_batch() -> Batch:
    """Two samples of three tokens."""
    ids, none = torch.arange(6).view(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    layout = Layout("none", torch.zeros(0, dtype=torch.long), torch.full((2, 3), -1), none)
    role = torch.full((2, 3), int(Role.UNKNOWN), dtype=torch.int8)
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.ones_like(role), role, layout, [])


def save(path: Path, values: dict[str, Tensor] | None = None, batch: Any = None) -> Path:
    """A small file."""
    return save_cache(path, {"a": torch.ones(2)} if values is None else values, batch or small_batch(), POINTS, None)


dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool])


@given(shape=st.lists(st.integers(0, 4), max_size=4), dtype=dtypes)
def test_any_tensor_comes_back(tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype) -> None:
    """Every dtype and shape, empty and 0-d too; NaN, infinity and -0 bit by bit."""
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    if dtype.is_floating_point and value.numel() > 2:
        value.view(-1)[:3] = torch.tensor([float("nan"), float("-inf"), -0.0], dtype=dtype)
    path = save(tmp_path_factory.mktemp("any") / "x", {"a": value})
    back = load_cache(path)[0]["a"]
    assert back.dtype == dtype
    assert back.shape == value.shape
    assert torch.equal(back.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_values_that_share_memory(tmp_path: Path) -> None:
    """The same tensor under two names is stored once; overlapping and transposed views come back as they look."""
    whole = torch.randn(4, 6)
    values = {"a": whole, "b": whole.view(4, 6), "c": whole[1:3], "d": whole.T.requires_grad_(False)}
    path = save(tmp_path / "x", values)
    with safe_open(path, framework="pt") as file:
        assert sorted(key for key in file.keys() if key.startswith("values/")) == ["values/a", "values/c", "values/d"]  # noqa: SIM118
        described = json.loads(file.metadata()["hooked_mm"])
    assert described["aliases"] == {"values/b": "values/a"}
    assert set(described["packages"]) == {"hooked-mm", "torch", "transformers", "safetensors"}
    back, _, points, _ = load_cache(path)
    assert list(back) == ["a", "b", "c", "d"]
    assert all(torch.equal(back[name], value) for name, value in values.items())
    assert points == POINTS


def test_a_batch_comes_back_with_all_it_holds(tmp_path: Path) -> None:
    """Lists of strings, odd characters; a value with a gradient is stored without."""
    batch = replace(small_batch(), tokens=[["▁a", '"', "\n"], ["é", "", "🙂"]])
    back = load_cache(save(tmp_path / "x", {"a": torch.ones(2, requires_grad=True)}, batch))
    assert back[1].tokens == batch.tokens
    assert not back[0]["a"].requires_grad


class Kind(Enum):
    """Stands for what a later batch may hold."""

    ONE = "one"


def test_later_fields_of_a_batch_are_kept_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that are listed, tuples, mappings; a class from elsewhere is refused, and nothing is written."""

    @dataclass(frozen=True)
    class Odd:
        """A class that a batch might get."""

        grid: tuple[int, int]
        rows: Any

    batch = small_batch()
    held = Odd((2, 3), {"x": [torch.ones(2), None, 1.5, True], "k": Kind.ONE})
    odd = replace(batch, tokens=held)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=r"batch/tokens is a Odd, which a cache file can't hold"):
        save(tmp_path / "x", batch=odd)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(cache_file.CLASSES, "Odd", Odd)
    back: Any = load_cache(save(tmp_path / "x", batch=odd))[1].tokens
    assert isinstance(back, Odd)
    assert back.grid == (2, 3)
    assert torch.equal(back.rows["x"][0], torch.ones(2))
    assert back.rows["x"][1:] == [None, 1.5, True]
    assert back.rows["k"] == "one"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up half-way: the earlier file is still there and whole, nothing else is."""
    path = save(tmp_path / "x", {"a": torch.zeros(3)})

    def full(tensors: Any, target: Path, metadata: Any) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(cache_file, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save(path, {"a": torch.ones(3)})
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert torch.equal(load_cache(path)[0]["a"], torch.zeros(3))
    with pytest.raises(BadInputError, match="is a folder; give the name of a file"):
        save(tmp_path)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    """Missing, cut off at any place, text, a pickle, somebody else's safetensors, another format."""
    path = tmp_path / "x"
    with pytest.raises(StoreError, match="there is no file"):
        load_cache(path)
    content = save(path).read_bytes()
    for size in (0, 4, 9, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(StoreError, match="is damaged or no safetensors file"):
            load_cache(path)
    path.write_text("not a tensor in sight, but long enough for a header")
    with pytest.raises(StoreError, match="is damaged or no safetensors file"):
        load_cache(path)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(StoreError, match="is damaged or no safetensors file"):
        load_cache(path)
    for metadata in (None, {"format": "pt"}, {"hooked_mm": "[1]"}):
        save_file({"a": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(StoreError, match=r"but not of an ActivationCache; use cache\.save"):
            load_cache(path)
    save_file({"a": torch.ones(2)}, path, metadata={"hooked_mm": "{"})
    with pytest.raises(StoreError, match="is damaged"):
        load_cache(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 99}, "has format 99, this version reads 1; update hooked-mm"),
        ({"values": ["a", "lost"]}, "does not hold what its header says"),
        ({"points": [{"name": "a", "strange": 1}]}, "does not hold what its header says"),
        ({"batch": {"class": "system", "fields": {}}}, "does not hold what its header says"),
        ({"batch": {"class": "replace", "fields": {}}}, "'replace' is not a class of a batch"),
        ({"batch": {"list": []}}, "its batch is not a Batch"),
        ({"aliases": {"values/b": "values/z"}}, "does not hold what its header says"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    """Whatever the header says, only classes of a batch are made, and what is lacking is noticed."""
    path = save(tmp_path / "x")
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["hooked_mm"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"hooked_mm": json.dumps(described | change)})
    with pytest.raises(StoreError, match=why):
        load_cache(path)
