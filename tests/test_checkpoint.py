"""Tensors of a checkpoint one by one: what is read equals what was written, and nothing else need be there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hooked_mm.checkpoint import Checkpoint, adapter_tensors, settled_dtype
from hooked_mm.errors import BadInputError
from tests.recording_hub import RecordingHub

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64), "c": torch.ones(4).half()}
SHARDS = {"one.x": {"a": TENSORS["a"], "b": TENSORS["b"]}, "two.x": {"c": TENSORS["c"]}}


def sharded(folder: Path, kind: str = "safetensors") -> Path:
    """The tensors in two files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for name, tensors in SHARDS.items():
        file = name.replace(".x", f".{kind}")
        write(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    main = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    index = {"metadata": {"total_size": 40}, "weight_map": weight_map}
    (folder / f"{main}.index.json").write_text(json.dumps(index))
    return folder


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_only_files_that_hold_what_is_asked_for_are_opened(tmp_path: Path, kind: str) -> None:
    """The other file is rubbish, and nobody notices until it is asked for."""
    folder = sharded(tmp_path / "c", kind)
    (folder / f"two.{kind}").write_bytes(b"rubbish")
    found = Checkpoint(folder)
    assert (found.opened, found.bytes_read, found.total_bytes) == ((), 0, 40)
    assert torch.equal(found.read("a"), TENSORS["a"])
    assert torch.equal(found.read("b"), TENSORS["b"])
    assert (found.opened, found.bytes_read, found.names_read) == ((f"one.{kind}",), 24 + 8, ("a", "b"))
    assert found.dtype("a") == torch.float32
    with pytest.raises(BadInputError, match=r"two\.\w+' is no file of tensors"):
        found.read("c")


@pytest.mark.parametrize(("kind", "name"), [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")])
def test_one_file_is_read_in_parts_too(tmp_path: Path, kind: str, name: str) -> None:
    """What is counted are the tensors asked for, each once."""
    write(tmp_path / name, TENSORS)
    found = Checkpoint(tmp_path)
    assert set(found.shards) == set(TENSORS)
    lazy = found.lazy(["c", "c"])
    assert torch.equal(lazy["c"][...], TENSORS["c"])
    assert (found.bytes_read, found.opened, found.total_bytes) == (8, (name,), (tmp_path / name).stat().st_size)


def test_what_is_read_does_not_hang_on_the_file(tmp_path: Path) -> None:
    """It has memory of its own."""
    write(tmp_path / "pytorch_model.bin", TENSORS)
    value = Checkpoint(tmp_path).read("a")
    assert value.untyped_storage().nbytes() == 24
    value += 1
    assert torch.equal(Checkpoint(tmp_path).read("a"), TENSORS["a"])


def test_of_the_hub_only_what_is_needed_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index and one file; where it lies is passed on."""
    hub = RecordingHub(tmp_path / "hub").put_in_place(monkeypatch)
    sharded(hub.kept / "me/x")
    found = Checkpoint("me/x", revision="v1", cache_dir="d")
    assert torch.equal(found.read("c"), TENSORS["c"])
    assert {call[2]["revision"] for call in hub.calls} == {"v1"}
    there = {path.name for path in (hub.kept / "snapshots/me/x").iterdir()}
    assert there == {"model.safetensors.index.json", "two.safetensors"}


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """With what is missing."""
    with pytest.raises(BadInputError, match="holds no weights that can be read in parts"):
        Checkpoint(tmp_path)
    folder = sharded(tmp_path / "c")
    (folder / "two.safetensors").unlink()
    with pytest.raises(BadInputError, match=r"lacks the file 'two\.safetensors'"):
        Checkpoint(folder).read("c")
    save_file({"other": torch.ones(1)}, folder / "two.safetensors")
    with pytest.raises(BadInputError, match=r"'two\.safetensors' lacks the tensor 'c'"):
        Checkpoint(folder).read("c")
    for text in ("{", "[]", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(BadInputError, match="is no index of a checkpoint"):
            _ = Checkpoint(folder).shards


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A file that would run something is refused."""
    torch.save({"a": SimpleNamespace(x=1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInputError, match="is no file of tensors"):
        Checkpoint(tmp_path).read("a")


def test_dtype(tmp_path: Path) -> None:
    """What is said, then what the configuration says, then that of the first weights."""
    write(tmp_path / "model.safetensors", {"i": TENSORS["b"], "w": TENSORS["c"]})
    found, silent = Checkpoint(tmp_path), SimpleNamespace(dtype=None)
    assert settled_dtype(found, silent, "bfloat16") == torch.bfloat16
    assert settled_dtype(found, silent, torch.float64) == torch.float64
    assert settled_dtype(found, SimpleNamespace(dtype="bfloat16"), "auto") == torch.bfloat16
    assert settled_dtype(found, silent, "auto") == torch.float16
    with pytest.raises(BadInputError, match="dtype='float31' is none"):
        settled_dtype(found, silent, "float31")


def test_names_of_an_adapter(tmp_path: Path) -> None:
    """Of either kind of file."""
    with pytest.raises(BadInputError, match="holds no PEFT adapter"):
        adapter_tensors(tmp_path)
    write(tmp_path / "adapter_model.bin", {"x.lora_A.weight": torch.ones(1)})
    assert adapter_tensors(tmp_path) == ["x.lora_A.weight"]
