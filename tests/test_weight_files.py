"""Weight files are read one at a time, and never run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hooked_mm.checkpoint import Checkpoint
from hooked_mm.errors import BadInputError
from hooked_mm.weight_files import entries, tensors
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
    files = Checkpoint(tmp_path).files
    assert files == written
    found = entries(files)
    assert {name: entry.shape for name, entry in found.items()} == {
        name: tuple(value.shape) for name, value in WEIGHTS.items()
    }
    read = {name: value for file in files for name, value in tensors(file)}
    assert all(torch.equal(read[name], value) for name, value in WEIGHTS.items())
    assert read.keys() == WEIGHTS.keys()
    assert [name for name, _ in tensors(found["a"].file, ["a"])] == ["a"]


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    """They are no archives and can't be mapped into memory."""
    file = tmp_path / "pytorch_model.bin"
    torch.save(WEIGHTS, file, _use_new_zipfile_serialization=False)
    assert entries([file])["a"].shape == (2, 3)
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in tensors(file))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """Names that two files hold, broken files, and the state of a training run."""
    files = write_weights(tmp_path, WEIGHTS, shards=3)
    save_file({"a": torch.ones(1)}, tmp_path / "again.safetensors")
    with pytest.raises(BadInputError, match=r"both .*00001.* and .*hold 'a'"):
        entries([files[0], tmp_path / "again.safetensors"])
    for name in ("half.safetensors", "half.bin"):
        (tmp_path / name).write_bytes(files[0].read_bytes()[:40])
        with pytest.raises(BadInputError, match=f"{name}' is no file of tensors"):
            entries([tmp_path / name])
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "state.bin")
    with pytest.raises(BadInputError, match="no table of tensors by name: 'model' is a dict"):
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
    with pytest.raises(BadInputError, match="would run code that came with it, so it is refused"):
        entries([file])
    with pytest.raises(BadInputError, match="refused"):
        list(tensors(file))
    assert not (tmp_path / "ran").exists()
