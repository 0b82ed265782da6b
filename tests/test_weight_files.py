"""Weight files are read one at a time, and never run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hooked_mm import weight_files as module
from hooked_mm.errors import BadInputError
from hooked_mm.weight_files import entries, tensors, weight_files
from tests.llava_folders import write_weights

WEIGHTS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor([1, 2]),
    "d": torch.ones(()),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_names_sizes_and_tensors_are_what_was_written(tmp_path: Path, kind: str, shards: int) -> None:
    """Of one file and of shards, of both kinds; some tensors alone as well."""
    written = write_weights(tmp_path, WEIGHTS, kind, shards)
    files = weight_files(tmp_path)
    assert files == written
    found = entries(files)
    assert {name: (e.shape, e.dtype) for name, e in found.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in WEIGHTS.items()
    }
    read = {name: value for file in files for name, value in tensors(file)}
    assert all(torch.equal(read[name], value) for name, value in WEIGHTS.items())
    assert read.keys() == WEIGHTS.keys()
    assert [name for name, _ in tensors(found["a"].file, ["a"])] == ["a"]


def test_safetensors_come_first_and_an_index_before_a_file(tmp_path: Path) -> None:
    """Where a folder holds several, what is newest and safest is read."""
    write_weights(tmp_path, WEIGHTS, "bin", 2)
    assert [file.suffix for file in weight_files(tmp_path)] == [".bin"] * 2
    write_weights(tmp_path, WEIGHTS)
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
    write_weights(tmp_path, WEIGHTS, shards=2)
    assert len(weight_files(tmp_path)) == 2


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    """They are no archives and can't be mapped into memory."""
    file = tmp_path / "pytorch_model.bin"
    torch.save(WEIGHTS, file, _use_new_zipfile_serialization=False)
    assert entries([file])["a"].shape == (2, 3)
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in tensors(file))


def test_folders_without_weights_and_broken_files_are_refused(tmp_path: Path) -> None:
    """Each with its name and what to do."""
    with pytest.raises(BadInputError, match=r"holds no weights: there is no model.safetensors.index.json or"):
        weight_files(tmp_path)
    files = write_weights(tmp_path, WEIGHTS, shards=3)
    files[1].unlink()
    with pytest.raises(BadInputError, match=rf"names {files[1].name}, which is not there"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(BadInputError, match="no file of its folder"):
        weight_files(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "again.safetensors")
    with pytest.raises(BadInputError, match=r"both .*00001.* and .*hold 'a'"):
        entries([files[0], tmp_path / "again.safetensors"])
    for name in ("half.safetensors", "half.bin"):
        (tmp_path / name).write_bytes(files[0].read_bytes()[:40])
        with pytest.raises(BadInputError, match=f"{name} can't be read|{name} holds more than tensors"):
            entries([tmp_path / name])
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "state.bin")
    with pytest.raises(BadInputError, match="no table of tensors by name"):
        entries([tmp_path / "state.bin"])


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading heads and reading tensors alike."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1), "b": Evil()}, file)
    with pytest.raises(BadInputError, match="would run code that came with it: refused"):
        entries([file])
    with pytest.raises(BadInputError, match="refused"):
        list(tensors(file))
    assert not (tmp_path / "ran").exists()


def test_from_the_hub_only_the_files_needed_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index first, then the files that it names; where there is none, the single file of either kind."""
    asked: list[list[str]] = []
    repository = {"model.safetensors.index.json"}

    def fetch(source: str, patterns: list[str], revision: str | None = None, what: str = "", **options: object) -> Path:
        asked.append(list(patterns))
        assert (revision, options) == ("v1", {"token": "t"})
        if patterns == ["*.json"]:
            return tmp_path
        if not set(patterns) <= repository:
            raise BadInputError("holds none")
        for name in patterns:
            (tmp_path / name).write_text("")
        return tmp_path

    monkeypatch.setattr(module, "fetch", fetch)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "b.st", "y": "a.st"}}))
    repository |= {"a.st", "b.st"}
    assert [file.name for file in weight_files("some/model", "v1", token="t")] == ["a.st", "b.st"]
    assert asked == [["*.json"], ["a.st", "b.st"]]
    (tmp_path / "model.safetensors.index.json").unlink()
    repository |= {"pytorch_model.bin"}
    asked.clear()
    assert [file.name for file in weight_files("some/model", "v1", token="t")] == ["pytorch_model.bin"]
    assert asked == [["*.json"], ["model.safetensors"], ["pytorch_model.bin"]]
