"""The command for visual-token ablation: its scores are those of its functions, over samples that have the set."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from analyses.ablation_command import ablated, asked_masks, curve_scores, effect_scores, joined, main
from analyses.deletion_curves import Curves
from analyses.model_samples import Samples
from analyses.result import Result
from analyses.targets import prompt_targets
from analyses.token_ablation import Fill, ablated_scores
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.scenes.draw import render

DATA = ("--data", "ScenesDataModule", "--data.task", "question", "--data.count", "2")


def test_masks_are_those_of_the_object_that_is_asked_about() -> None:
    """None where a question asks about no object; none at all for captions."""
    data = ScenesDataModule(2, "questions", count=2)
    samples = [data.dataset[number] for number in range(len(data.dataset))]  # type: ignore[arg-type]
    masks = asked_masks(data, samples)
    assert masks is not None
    kinds = {}
    for number, (sample, mask) in enumerate(zip(samples, masks, strict=True)):
        about = data.scenes.asked(number).about
        assert (mask is None) == (about is None)
        kinds[sample.columns["question_type"]] = mask is not None
        if mask is not None and about is not None:
            scene = data.scenes.shown(number)
            drawn = render(scene)[1][scene.objects.index(about)] > 0.5
            np.testing.assert_array_equal(mask.numpy(), drawn)
    assert kinds["colour"]
    assert not kinds["place"]
    assert asked_masks(ScenesDataModule(2), samples) is None


def test_effects_are_means_over_samples_that_have_the_set() -> None:
    """And beside controls of the same size, on the same samples."""
    nan = torch.nan
    made = effect_scores(
        {
            "the object": torch.tensor([4.0, nan, 2.0]).double(),
            "random tokens": torch.tensor([1.0, 5.0, 1.0]).double(),
        },
        50,
        0,
    )
    values = {one.score: (one.value, one.samples) for one in made}
    assert values == {
        "lost without the object": (3.0, 2),
        "lost without random tokens": (pytest.approx(7 / 3), 3),
        "lost without the object, less random tokens": (2.0, 2),
    }


def test_areas_of_batches_are_those_of_all_samples() -> None:
    """Those that can't be normalised are counted."""
    shares = torch.tensor([[0.0], [1.0]]).double()
    one = Curves(shares, torch.tensor([[[1.0], [0.0]]]).double(), torch.tensor([[[0.0], [1.0]]]).double())
    two = Curves(shares, torch.tensor([[[0.2], [0.2]]]).double(), torch.tensor([[[0.2], [0.2]]]).double())
    found = {score.score: score for score in curve_scores({"norm": joined([one, two])}, 20, 0)}
    assert found["deletion AUC: norm"].value == pytest.approx(0.35)
    assert found["deletion AUC, normalised: norm"].value == 0.5
    assert found["deletion AUC, normalised: norm"].left_out == 1


def test_samples_without_pictures_count_nowhere(llava: HookedMM, images: list[Image.Image]) -> None:
    """And that is said; a data set that knows no objects has sets of a share of the tokens."""
    options = {
        "kind": "logit",
        "share": 0.125,
        "region_share": 0.5,
        "controls": 2,
        "random_orders": 2,
        "orders": ["norm"],
        "steps": 2,
    }
    made = SimpleNamespace(**options, rows=64, seed=0)
    given = [
        Sample("one", images[0], "what place is this ?", "sea"),
        Sample("none", None, "what place is this ?", "sea"),
        Sample("two", images[1], "what is there ?", "red"),
    ]
    found = ablated(Samples(llava, SampleDataModule(given), "given"), Fill(), made)
    assert {name: parts[0].shape for name, parts in found.effects.items()} == dict.fromkeys(
        ("all tokens", "largest norm", "random tokens", "random regions"), (2,)
    )
    assert found.notes == ["1 samples have no picture, and count nowhere"]
    alone = ablated(Samples(llava, SampleDataModule(given[2:]), "given"), Fill(), made)
    for name, (values,) in alone.effects.items():
        torch.testing.assert_close(values, found.effects[name][0][1:], rtol=0, atol=1e-4)
    with pytest.raises(BadInputError, match="no sample is left to look at: 1 samples have no picture"):
        ablated(Samples(llava, SampleDataModule(given[1:2]), "given"), Fill(), made)


@pytest.mark.usefixtures("loaded")
def test_the_command_writes_effects_and_curves(
    llava: HookedMM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blank picture's effect is that of a picture without any token."""
    given = ["--model.id", "small:llava", *DATA, "--data.size", "4", "--answer", "given", "--draws", "20"]
    more = ["--controls", "2", "--steps", "2", "--orders", "[region, alone]", "--fill", "zero"]
    main([*given, *more, "--output", str(tmp_path / "out")])
    result = Result.load(tmp_path / "out")
    by = {score.score: score for score in result.scores}
    data = ScenesDataModule(4, "question", count=2)
    samples = [data.dataset[number] for number in range(len(data.dataset))]  # type: ignore[arg-type]
    batch = llava.prepare([sample.images for sample in samples], [sample.text for sample in samples])
    first = [llava.tokenizer(str(sample.answer), add_special_tokens=False)["input_ids"][0] for sample in samples]
    sets = torch.stack([torch.zeros(len(samples), 64), torch.ones(len(samples), 64)]).bool()
    scores = ablated_scores(llava, batch, prompt_targets(batch, first), sets, Fill("zero"))
    assert by["lost without all tokens"].value == pytest.approx(float((scores[0] - scores[1]).mean()), abs=1e-3)
    asked = sum(mask is not None for mask in asked_masks(data, samples) or [])
    assert by["lost without the object"].samples == by["deletion AUC: alone"].samples == asked < len(samples)
    assert by["lost without random regions"].samples == len(samples)
    with open(tmp_path / "out" / "curves.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3
    ends = {row["probability"][:6] for row in rows if (row["curve"], row["share"]) == ("deletion", "0.0")}
    assert len(ends) == 1
    assert (tmp_path / "out" / "curves.png").is_file()
    assert "lost without the object" in capsys.readouterr().out
    with pytest.raises(BadInputError, match="controls=0"):
        main([*given, "--controls", "0", "--output", str(tmp_path / "none")])
