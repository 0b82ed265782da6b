"""The command: what it writes is what the views say, of every sample and token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from analyses.attention_command import drawn_maps, look, main, scores
from analyses.attention_views import answer_attention, head_maps
from analyses.model_samples import Samples
from analyses.picture_maps import PictureMap
from analyses.result import Result
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import load_images
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.tensor_folder import read_json, read_tensors
from tests.processors import processor
from tests.tiny import tiny

MODEL = ["--model.id", "small:llava", "--model.dtype", "float32", "--draws", "20"]
DATA = ["--data", "ScenesDataModule", "--data.task", "questions", "--data.size", "2", "--data.batch_size", "3"]


@pytest.mark.usefixtures("loaded")
def test_what_is_written_is_what_the_views_say(llava: HookedMM, tmp_path: Path) -> None:
    """Of the second sample's first token: heads x layers, and a chosen head's map; scores are means over samples."""
    out = tmp_path / "out"
    layers = [
        "--layers",
        "[1, 4]",
        "--pairs",
        "[[4, 2]]",
        "--samples",
        "2",
        "--max_new_tokens",
        "3",
        "--tokens",
        "first",
    ]
    main([*MODEL, *DATA, *layers, "--output", str(out)])
    data = ScenesDataModule(task="questions", size=2)
    samples = [data.dataset[number] for number in range(len(data.ids()))]
    pictures = [load_images(sample.images)[0] for sample in samples]
    batch = llava.generate(llava.prepare(pictures, [sample.text for sample in samples]), 3).batch
    assert batch is not None
    found = answer_attention(llava, batch, "first", [1, 4])
    about = read_json(out, "maps", "maps", "")
    tensors = read_tensors(out, "maps", about)
    own = found.targets.sample == 1
    for column in ("image", "question"):
        share = found.by_head(column, share=True).float()
        assert torch.allclose(tensors[f"sample-1/{column} share of attention"], share[own], atol=1e-5)
        mean = found.by_head(column)
        assert torch.allclose(tensors[f"sample-1/{column} mean attention per column"].double(), mean[own], atol=1e-5)
    token = int(own.nonzero()[0])
    (maps,) = head_maps(llava, batch, found, token, [(4, 2)], [pictures[1]]).values()
    key = "sample-1/answer-0/layer-4/head-2/picture-0"
    assert torch.allclose(tensors[key], maps[0].values.float(), atol=1e-5)
    assert about["layers"] == [1, 4]
    assert [one["id"] for one in about["samples"]] == [sample.id for sample in samples[:2]]
    assert about["samples"][1]["boxes"][key] == pytest.approx(maps[0].box)
    result = Result.load(out)
    by_sample = [
        found.by_head("image", share=True)[found.targets.sample == n].mean((0, 2)) for n in range(len(samples))
    ]
    expected = torch.stack(by_sample).mean(0)
    found_scores = result.of("share of attention", "image")
    assert [score.layer for score in found_scores] == [1, 4]
    assert [score.value for score in found_scores] == pytest.approx(expected.tolist(), abs=1e-5)
    assert all(score.low <= score.value <= score.high and score.samples == len(samples) for score in found_scores)
    page = (out / "gallery.html").read_text()
    assert page.count("<section>") == int((found.targets.sample < 2).sum())
    assert (out / "heads.png").stat().st_size > 5000


@pytest.mark.parametrize("family", [pytest.param("mllama", marks=pytest.mark.slow), "llava_next"])
def test_pictures_of_all_kinds_and_samples_without_one(family: str, images: list[Image.Image]) -> None:
    """One picture, two, none: shares are NaN where there is nothing to look at, and clicked patches are looked up."""
    model = HookedMM(tiny(family), processor(family), check=False)
    given = [
        Sample("a", images[0], "what is this ?", "red"),
        Sample("b", images[1:3], "what ?", "blue star"),
        Sample("c", None, "what is that ?", "green"),
    ]
    samples = Samples(model, SampleDataModule(given, batch_size=3), "given", on_error="stop")
    options: dict[str, Any] = {
        "tokens": "first",
        "layers": None,
        "heads": None,
        "samples": 3,
        "show": 1,
        "pairs": [],
        "scale": "own",
    }
    seen = look(samples, SimpleNamespace(**options, points=[(0, 0.3, 0.6)]))
    share = torch.stack(seen.heads["share of attention", "image"])
    assert share.isfinite().flatten(1).all(1).tolist() == [True, True, False]
    grids = {"llava_next": 2, "mllama": 1}[family]
    # Heads x layers, the pictures, and a map per grid.
    assert [len(entry.pictures) for entry in seen.entries] == [1 + 1 + grids, 1 + 2 + 2 * grids, 1]
    assert "sample-2/clicked patches, mean per column" not in seen.tensors
    clicked = seen.tensors["sample-1/clicked patches, mean per column"]
    assert clicked.shape == (1, *share.shape[1:])
    assert bool(((clicked > 0) & (clicked < 1)).all())
    assert len(scores(seen, 5, 0)) == 2 * 2 * len(seen.layers)
    with pytest.raises(BadInputError, match=r"point \[0, 1.5, 0.5\] of 1 pictures"):
        look(samples, SimpleNamespace(**options, points=[(0, 1.5, 0.5)]))


@pytest.mark.usefixtures("loaded")
def test_without_answers_there_is_nothing_to_look_from(tmp_path: Path) -> None:
    """Refused before the model runs."""
    with pytest.raises(BadInputError, match="answer=none"):
        main([*MODEL, *DATA, "--answer", "none", "--output", str(tmp_path)])


def test_maps_are_drawn_in_either_scale_or_both() -> None:
    """Captions tell layer, head, grid and values; an empty map says that it is empty."""
    picture = Image.new("RGB", (40, 40))
    box = (0.0, 0.0, 40.0, 40.0)
    maps = {
        (1, 2): [PictureMap(0, False, torch.rand(4, 4), box), PictureMap(0, True, torch.rand(2, 2), box)],
        (3, 0): [PictureMap(0, False, torch.zeros(4, 4), box)],
    }
    captions = [caption for caption, _ in drawn_maps(maps, [picture])]
    assert len(captions) == 6
    assert captions[1].startswith("layer 1, head 2, overview: ")
    assert captions[2] == "layer 3, head 0: empty: 0 everywhere, own scale"
    assert [caption for caption, _ in drawn_maps(maps, [picture], "common")] == captions[3:]
    assert drawn_maps(maps, [picture] * 2, "own")[0][0].startswith("layer 1, head 2, picture 1: ")
    assert drawn_maps({}, [picture]) == []
