"""The command: what it writes is what `grad_cam` says; maps without a gradient are not drawn, and named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analyses.grad_cam import grad_cam
from analyses.gradcam_command import main
from analyses.picture_maps import picture_maps
from analyses.result import Result
from analyses.targets import answer_targets
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import load_images
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.tensor_folder import read_json, read_tensors

MODEL = ["--model.id", "small:llava", "--model.dtype", "float32", "--draws", "20", "--answer", "given"]
DATA = ["--data", "ScenesDataModule", "--data.task", "questions", "--data.size", "1", "--data.batch_size", "4"]


@pytest.mark.usefixtures("loaded")
def test_what_is_written_is_what_grad_cam_says(llava: HookedMM, tmp_path: Path) -> None:
    """The second question about a scene: its map over the picture, and the share on it over layers."""
    main([*MODEL, *DATA, "--layers", "[2, -1]", "--samples", "2", "--tokens", "first", "--output", str(tmp_path)])
    data = ScenesDataModule(task="questions", size=1)
    every = [data.dataset[number] for number in range(len(data.ids()))]
    pictures = [load_images(sample.images) for sample in every]
    batch = llava.prepare(pictures, [one.text for one in every], answers=[one.answer for one in every])
    found = grad_cam(llava, batch, answer_targets(batch, "first"), layers=[2, 5])
    about = read_json(tmp_path, "maps", "maps", "")
    tensors = read_tensors(tmp_path, "maps", about)
    own = (batch.modality[1] != 0).nonzero()[:, 0]
    cam = tensors["sample-1/answer-0/cam"]
    torch.testing.assert_close(cam[..., -len(own) :], found.maps[1][..., own], rtol=1e-3, atol=1e-6)
    (over,) = picture_maps(llava, batch, 1, found.maps[1][0, 0], pictures[1])
    written = tensors["sample-1/answer-0/layer-2/picture-0"]
    torch.testing.assert_close(written, over.values.float(), rtol=1e-3, atol=1e-6)
    image = batch.mask("image")
    shares = [maps[:, 0, image[n]].sum(1) / maps[:, 0].sum(1) for n, maps in enumerate(found.maps)]
    result = Result.load(tmp_path)
    scores = result.of("share of Grad-CAM", "image")
    assert [score.layer for score in scores] == [2, 5]
    assert [score.value for score in scores] == pytest.approx(torch.stack(shares).mean(0).tolist(), rel=1e-3)
    assert result.notes == []
    page = (tmp_path / "gallery.html").read_text()
    assert page.count("<section>") == 2
    assert "layer 5: " in page


@pytest.mark.usefixtures("loaded")
def test_question_maps_of_the_last_layer_are_said_to_be_empty(tmp_path: Path) -> None:
    """Not drawn, no part of means, no score on the picture; of every other layer there are."""
    options = ["--rows", "question", "--layers", "[4, 5]", "--samples", "1", "--tokens", "first"]
    main([*MODEL, *DATA, *options, "--output", str(tmp_path / "both")])
    result = Result.load(tmp_path / "both")
    assert [one.layer for one in result.of("share of Grad-CAM")] == [4]
    assert [one.value for one in result.of("rows with a gradient")] == [1, 0]
    assert result.notes == ["layer 5: 100% of the rows asked for have no gradient, so that their maps are empty"]
    page = (tmp_path / "both" / "gallery.html").read_text()
    assert "Rows without a gradient at layer 5" in page
    assert "row of &#39;?&#39;" in page
    main([*MODEL, *DATA, *options, "--layers", "[5]", "--output", str(tmp_path / "last")])
    about = read_json(tmp_path / "last", "maps", "maps", "")
    tensors = read_tensors(tmp_path / "last", "maps", about)
    assert [name for name in tensors if "picture" in name] == []
    assert "zero everywhere: mean, row of" in (tmp_path / "last" / "gallery.html").read_text()
