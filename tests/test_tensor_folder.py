"""Tensors with their story: both files or a refusal; what dictionaries and vectors say of it is tested with them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hooked_mm.errors import BadInputError
from hooked_mm.tensor_folder import FOREIGN, read_json, read_tensors, write_folder


def test_two_files_and_a_checksum(tmp_path: Path) -> None:
    """Other programs can read both; the checksum is that of the file; views and gradients are no obstacle."""
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    folder = write_folder(tmp_path / "deep" / "x", "thing", {"view": whole.T, "row": whole[1]}, {"a": [1, None]})
    assert sorted(file.name for file in folder.iterdir()) == ["thing.json", "thing.safetensors"]
    assert torch.equal(load_file(folder / "thing.safetensors")["view"], whole.detach().T)
    content = json.loads((folder / "thing.json").read_text())
    assert content["sha256"] == hashlib.sha256((folder / "thing.safetensors").read_bytes()).hexdigest()
    assert read_json(folder, "thing", "thing", "none") == content == {"a": [1, None], "sha256": content["sha256"]}
    assert torch.equal(read_tensors(folder, "thing", content)["row"], torch.tensor([4.0, 5, 6, 7]))


def test_what_is_no_json_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    """A story that can't be told is refused before tensors without it are there."""
    write_folder(tmp_path, "thing", {"x": torch.ones(2)}, {"of": "old"})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_folder(tmp_path, "thing", {"x": torch.zeros(2)}, {"of": {1, 2}})
    content = read_json(tmp_path, "thing", "thing", "none")
    assert content["of"] == "old"
    assert torch.equal(read_tensors(tmp_path, "thing", content)["x"], torch.ones(2))


@pytest.mark.parametrize("damage", ["changed", "missing", "no checksum"])
def test_half_a_folder_is_refused(damage: str, tmp_path: Path) -> None:
    """Tensors that are not those the JSON speaks of are not read."""
    content = read_json(write_folder(tmp_path, "thing", {"x": torch.ones(2)}, {}), "thing", "thing", "none")
    file = tmp_path / "thing.safetensors"
    if damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    elif damage == "missing":
        file.unlink()
    else:
        content = {}
    with pytest.raises(BadInputError, match=r"thing.safetensors' is not the file that thing.json speaks of.*by half"):
        read_tensors(tmp_path, "thing", content)


@pytest.mark.parametrize("text", ["{", "[1]", "7", "\xff"])
def test_json_that_tells_no_story_is_refused(text: str, tmp_path: Path) -> None:
    """Broken, of another shape, or no text at all."""
    (tmp_path / "thing.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInputError, match=r"thing.json' (is no JSON|holds a (list|int), which is no fine thing)"):
        read_json(tmp_path, "thing", "fine thing", "none")


@pytest.mark.parametrize("ending", FOREIGN)
def test_foreign_formats_are_named(ending: str, tmp_path: Path) -> None:
    """Whether the file itself is given or its folder, what it is and the way out are said, and nothing is opened."""
    (tmp_path / f"x{ending}").write_bytes(b"anything")
    kind = FOREIGN[ending].format(json="thing.json")
    for path in (tmp_path, tmp_path / f"x{ending}"):
        said = f"'x{ending}' is {kind}, which is not read: do this instead"
        with pytest.raises(BadInputError, match=re.escape(said)):
            read_json(path, "thing", "thing", "do this instead")
