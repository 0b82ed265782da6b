"""The command: what it writes is what the rules say, of tokens, roles and patches; a tower without a rule is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import analyses.relevancy_command as command
from analyses.result import Result
from analyses.targets import answer_targets
from analyses.tower_relevancy import end_to_end
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import load_images
from hooked_mm.scenes.dataset import SceneDataset, ScenesDataModule, picture
from hooked_mm.tensor_folder import read_json, read_tensors

MODEL = ["--model.id", "small:llava", "--model.dtype", "float32", "--draws", "20", "--answer", "given"]
DATA = ["--data", "ScenesDataModule", "--data.task", "questions", "--data.size", "1", "--data.batch_size", "4"]


@pytest.mark.usefixtures("loaded")
def test_what_is_written_is_what_the_rules_say(llava: HookedMM, tmp_path: Path) -> None:
    """Shares by role add up to one; a map of the language model's positions, and one through the tower."""
    command.main([*MODEL, *DATA, "--samples", "2", "--output", str(tmp_path)])
    data = ScenesDataModule(task="questions", size=1)
    every = [data.dataset[number] for number in range(len(data.ids()))]
    pictures = [load_images(sample.images) for sample in every]
    batch = llava.prepare(pictures, [one.text for one in every], answers=[one.answer for one in every])
    targets = answer_targets(batch)
    found = end_to_end(llava, batch, targets)
    about = read_json(tmp_path, "maps", "maps", "")
    tensors = read_tensors(tmp_path, "maps", about)
    number = int((targets.sample == 1).nonzero()[0])
    own = (batch.modality[1] != 0).nonzero()[:, 0]
    written = tensors["sample-1/answer-0/positions"]
    torch.testing.assert_close(written[-len(own) :], found.text.positions[number, own].float(), rtol=1e-3, atol=1e-6)
    (over,) = found.maps(llava, batch, number, pictures[1])
    through = tensors["sample-1/answer-0/through-the-tower/picture-0"]
    torch.testing.assert_close(through, over.values.float(), rtol=1e-3, atol=1e-6)
    assert tensors["sample-1/answer-0/language-model/picture-0"].shape == through.shape
    result = Result.load(tmp_path)
    assert sum(one.value for one in result.of("share of relevancy")) == pytest.approx(1, abs=1e-5)
    image = [
        float(found.text.positions[n, batch.mask("image")[s]].sum()) for n, s in enumerate(targets.sample.tolist())
    ]
    by_sample = [
        sum(v for v, s in zip(image, targets.sample.tolist(), strict=True) if s == n) / int((targets.sample == n).sum())
        for n in range(len(batch))
    ]
    assert result.of("share of relevancy", "image")[0].value == pytest.approx(sum(by_sample) / len(by_sample), rel=1e-3)
    page = (tmp_path / "gallery.html").read_text()
    assert "most relevant words" in page
    assert "through the tower: " in page


@pytest.mark.usefixtures("loaded")
def test_a_tower_without_a_rule_is_told_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps then are those of the language model's positions; `--tower true` insists."""

    def refuse(*_: object, **__: object) -> None:
        raise BadInputError("attends within windows")

    monkeypatch.setattr(command, "end_to_end", refuse)
    few = [*MODEL, *DATA, "--samples", "1", "--tokens", "first"]
    command.main([*few, "--output", str(tmp_path / "told")])
    result = Result.load(tmp_path / "told")
    assert result.notes == ["relevancy ends at the language model's positions: attends within windows"]
    about = read_json(tmp_path / "told", "maps", "maps", "")
    names = [name for name in read_tensors(tmp_path / "told", "maps", about) if "picture" in name]
    assert names == ["sample-0/answer-0/language-model/picture-0"]
    with pytest.raises(BadInputError, match="attends within windows"):
        command.main([*few, "--tower", "true", "--output", str(tmp_path / "refused")])


def test_a_batch_without_pictures_does_not_end_the_towers_part(llava: HookedMM) -> None:
    """The next batch has pictures again."""
    explainer = command.Explainer(llava, SimpleNamespace(tower=None, kind="logit", normalise=True))
    bare = llava.prepare(None, ["what place is this ?"], answers=["city"])
    assert explainer.relevant(bare, answer_targets(bare))[1] is None
    shown = llava.prepare(picture(SceneDataset(1).scene(0)), "what place is this ?", answers=["city"])
    assert explainer.relevant(shown, answer_targets(shown))[1] is not None
    assert explainer.notes == []
