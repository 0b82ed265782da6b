"""Files written as XL-VLMs writes them become stores; what is not such a file is refused and never run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_mm.errors import StoreError
from hooked_mm.store import ActivationStore
from hooked_mm.store_command import main
from hooked_mm.xl_vlms import hook_name, import_features

MODULES = ("language_model.model.layers.3", "language_model.model.layers.10")
HOOKS = ["blocks.10.hook_resid_post", "blocks.3.hook_resid_post"]


def features(positions: tuple[int, ...] = (1, 1, 1, 1), found: tuple[bool, ...] | None = None) -> dict[str, Any]:
    """What their `save_hidden_states_to_file` saves: lists over samples, each of a batch of one."""
    generator = torch.Generator().manual_seed(0)
    data: dict[str, Any] = {
        "hidden_states": [
            {module: torch.randn(1, count, 8, generator=generator).half() for module in MODULES} for count in positions
        ],
        "image": [[f"/data/val2014/{number}.jpg"] for number in range(len(positions))],
        "model_predictions": [[f"a cat number {number}"] for number in range(len(positions))],
    }
    if found is not None:
        data["token_of_interest_mask"] = [torch.tensor([value]) for value in found]
    return data


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Four samples, the token of interest in three."""
    torch.save(features(found=(True, False, True, True)), tmp_path / "features.pth")
    return tmp_path / "features.pth"


def test_every_sample_with_the_token(saved: Path, tmp_path: Path) -> None:
    """Values, images and predictions stay together; where the token was not found nothing is made up."""
    store = import_features(saved, tmp_path / "s", made_by={"model": "llava-hf/llava-1.5-7b-hf"})
    data = features()
    assert store.hooks == HOOKS
    assert store.made_by["model"] == "llava-hf/llava-1.5-7b-hf"
    assert store.samples.column("text").to_pylist() == [f"a cat number {n}" for n in (0, 2, 3)]
    assert store.samples.column("image").to_pylist() == [f"/data/val2014/{n}.jpg" for n in (0, 2, 3)]
    assert store.skipped.to_pylist() == [{"sample": "1", "reason": "the token of interest was not found in it"}]
    for module in MODULES:
        expected = torch.cat([data["hidden_states"][n][module][0] for n in (0, 2, 3)])
        assert torch.equal(store.activations(hook_name(module)), expected)


def test_all_positions(tmp_path: Path) -> None:
    """A file of whole sequences has a row per position."""
    torch.save(features((5, 2, 7)), tmp_path / "f.pth")
    store = import_features(tmp_path / "f.pth", tmp_path / "s")
    assert store.rows.column("sample").to_pylist() == ["0"] * 5 + ["1"] * 2 + ["2"] * 7
    assert len(store.where(sample="2")) == 7


def test_modules_that_are_no_blocks(tmp_path: Path) -> None:
    """They need a name from the user, so that none is guessed."""
    data = features()
    data["hidden_states"] = [{"lm_head": state[MODULES[0]]} for state in data["hidden_states"]]
    torch.save(data, tmp_path / "f.pth")
    with pytest.raises(StoreError, match="'lm_head' is not a block of a language model"):
        import_features(tmp_path / "f.pth", tmp_path / "s")
    assert import_features(tmp_path / "f.pth", tmp_path / "s", names={"lm_head": "logits"}).hooks == ["logits"]
    with pytest.raises(StoreError, match="is not a block"):
        hook_name("vision_tower.encoder.layers.3")


class Runs:
    """Would make a folder if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    """A file with an object in it is refused with the way out."""
    torch.save({**features(), "extra": Runs(tmp_path / "run")}, tmp_path / "f.pth")
    with pytest.raises(StoreError, match="keep tensors, text and numbers only"):
        import_features(tmp_path / "f.pth", tmp_path / "s")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"states": []}, "no list 'hidden_states'"),
        ([1, 2], "no list 'hidden_states'"),
        ({"hidden_states": []}, "no list 'hidden_states'"),
        ({**features(), "image": ["a"]}, "has 4 samples, but 1 of 'image'"),
        ({"hidden_states": [{MODULES[0]: torch.zeros(1, 2, 4)}, {}]}, "sample 1 .* has no 'language_model"),
        ({"hidden_states": [{MODULES[0]: torch.zeros(2, 2, 4)}]}, r"of shape \(2, 2, 4\)"),
        ({"hidden_states": [{MODULES[0]: torch.zeros(2, 4), MODULES[1]: torch.zeros(3, 4)}]}, "import the modules"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    """Each with what is wrong, and no store is left behind that could be taken for one."""
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(StoreError, match=said):
        import_features(tmp_path / "f.pth", tmp_path / "s")
    with pytest.raises(StoreError):
        ActivationStore.open(tmp_path / "s")


def test_no_file_and_no_tensors(tmp_path: Path) -> None:
    """A wrong path and a file of another kind."""
    with pytest.raises(StoreError, match="there is no file"):
        import_features(tmp_path / "f.pth", tmp_path / "s")
    (tmp_path / "f.pth").write_text("hello")
    with pytest.raises(StoreError, match="is no file of plain tensors"):
        import_features(tmp_path / "f.pth", tmp_path / "s")


def test_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`hooked-mm store import`."""
    main(["import", str(tmp_path / "s"), str(saved)])
    assert "3 rows of 3 samples, 2 hooks, 1 skipped" in capsys.readouterr().out
