"""The command for segmentation: cases of scenes, means over pictures, trained beside random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analyses.result import Result
from analyses.segment_command import by_picture, lens_maps, main, object_masks
from analyses.segmentation import Case
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.scenes.draw import mask as cover
from hooked_mm.scenes.world import SHAPES, Scene, SceneObject


def test_objects_of_the_same_word_share_a_mask() -> None:
    """Two red ones; the other word has its own."""
    things = [("circle", "red", 0.25), ("star", "blue", 0.5), ("square", "red", 0.75)]
    objects = tuple(SceneObject(shape, colour, "small", x, 0.3, 0.13) for shape, colour, x in things)
    found = object_masks(Scene("sea", objects, 3, 64, 48), "colour")
    assert list(found) == ["red", "blue"]
    both = sum(torch.from_numpy(cover(thing, 64, 48) > 0.5) for thing in (objects[0], objects[2]))
    assert torch.equal(found["red"], both.bool())  # type: ignore[union-attr]


def test_a_case_for_every_word_that_is_true_of_a_scene(llava: HookedMM) -> None:
    """However many scenes go together, numbered through."""
    data = SceneDataset(5)
    maps, again = (lens_maps(llava, data, "shapes", size) for size in (2, 5))
    expected = [(n, thing) for n in range(5) for thing in dict.fromkeys(o.shape for o in data.scene(n).objects)]
    assert [(case.picture, case.word) for case in maps.cases] == expected
    torch.testing.assert_close(maps.confidence, again.confidence, rtol=1e-4, atol=1e-6)
    assert maps.present.nonzero().tolist() == sorted([n, SHAPES.index(word)] for n, word in expected)
    assert maps.confidence.shape == (5, 6)
    for case in maps.cases:
        assert float(maps.confidence[case.picture, SHAPES.index(case.word)]) == pytest.approx(float(case.grid.max()))


def test_words_of_a_picture_are_averaged_first() -> None:
    """A picture without any is not a number."""
    cases = [Case(n, "red", torch.zeros(1, 1, 1), (0, 0, 1, 1), torch.ones(1, 1, dtype=torch.bool)) for n in (0, 0, 2)]
    found = by_picture(torch.tensor([1.0, 0.0, 3.0]), cases, 3)
    assert found[[0, 2]].tolist() == [0.5, 3.0]
    assert found[1].isnan()


@pytest.mark.usefixtures("loaded")
def test_the_command_scores_the_trained_model_beside_random_weights(tmp_path: Path) -> None:
    """Pictures, scores with their intervals, and the setting in the notes; scenes for both are refused."""
    few = ["--model.id", "small:llava", "--data.size", "4", "--validation.size", "2", "--draws", "20"]
    main([*few, "--word_classes", "[colours]", "--output", str(tmp_path / "out")])
    trained, control = Result.load(tmp_path / "out"), Result.load(tmp_path / "out" / "random weights")
    (ours,), (box,), (theirs,) = (
        trained.of("colours: IoU"),
        trained.of("colours: IoU of the centre box"),
        control.of("colours: IoU"),
    )
    assert ours.value > 2 * box.value
    assert ours.value > 2 * theirs.value
    assert ours.low <= ours.value <= ours.high
    assert [score.layer for score in trained.of("colours: pixel AUROC over layers")] == list(range(7))
    assert "colours: layer" in trained.notes[0]
    assert (tmp_path / "out" / "pictures.png").stat().st_size > 10_000
    with pytest.raises(BadInputError, match="both scenes of split 'test'"):
        main([*few, "--validation.split", "test", "--output", str(tmp_path / "same")])
    with pytest.raises(BadInputError, match="no word class 'places'"):
        main([*few, "--word_classes", "[places]", "--output", str(tmp_path / "places")])
