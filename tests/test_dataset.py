"""Scenes as samples: random access, splits that share nothing, and the truth in the columns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError
from hooked_mm.scenes.captions import CAPTION_PROMPT, STYLES, caption
from hooked_mm.scenes.dataset import SceneDataset, ScenesDataModule, Task, picture
from hooked_mm.scenes.questions import QUESTION_TYPES
from hooked_mm.scenes.world import SPLITS, scene
from tests.test_questions import truth


def pixels(image: object) -> bytes:
    """A sample's picture as bytes."""
    assert isinstance(image, Image.Image)
    return image.tobytes()


@given(st.lists(st.integers(0, 11), min_size=1, max_size=6), st.sampled_from(["caption", "question", "questions"]))
def test_random_access_equals_sequential(order: list[int], task: Task) -> None:
    """Samples do not depend on which were asked for before."""
    one_by_one = list(map(SceneDataset(12, task, seed=3).__getitem__, range(12)))
    data = SceneDataset(12, task, seed=3)
    for index in order:
        got, expected = data[index], one_by_one[index]
        assert (got.id, got.text, got.answer, got.columns) == (
            expected.id,
            expected.text,
            expected.answer,
            expected.columns,
        )
        assert pixels(got.images) == pixels(expected.images)


def test_the_size_changes_nothing_but_the_end() -> None:
    """A larger data set begins with the smaller one."""
    small, large = SceneDataset(3), SceneDataset(300)
    assert [small.scene(i) for i in range(3)] == [large.scene(i) for i in range(3)]


def test_splits_and_seeds_share_no_scene() -> None:
    """Scenes of two splits, or of two seeds of a split, are different scenes with different ids."""
    sets = [SceneDataset(60, split=split, seed=seed) for split in SPLITS for seed in (0, 1, 999)]
    seen = [data.scene(index) for data in sets for index in range(len(data))]
    assert len(set(seen)) == len(seen)
    ids = [name for data in [*sets, SceneDataset(60, count=1)] for name in data.ids()]
    assert len(set(ids)) == len(ids)


def test_ids_are_those_of_the_samples() -> None:
    """`ids()`, which renders nothing, agrees with the samples."""
    data = SceneDataset(5, split="validation", seed=8)
    assert data.ids() == [data[index].id for index in range(5)]
    assert len(data) == 5


def test_iteration_ends() -> None:
    """Beyond the last sample there is an IndexError, so that `for sample in data` ends."""
    data = SceneDataset(3)
    assert len(list(data)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError):
            data[index]


def test_caption_samples_hold_the_truth() -> None:
    """Columns repeat the scene's attributes in order; text and answer are the prompt and a sentence naming them all."""
    data = SceneDataset(20, seed=2)
    for index in range(20):
        sample, item = data[index], scene("test", index, 2)
        assert sample.text == CAPTION_PROMPT
        assert sample.columns["question_type"] == "caption"
        for name in ("shape", "colour", "size", "position"):
            values = [getattr(o, name) for o in item.objects]
            assert sample.columns[name] == values
            assert sample.answer is not None
            assert all(value in sample.answer for value in values)
        assert sample.columns["place"] == item.place
        assert sample.columns["held_out"] is False
        assert set(sample.columns["facts"]) == item.facts()
        assert pixels(sample.images) == picture(item).tobytes()


def test_question_samples_draw_from_every_type() -> None:
    """Over 300 scenes each type is asked; where the answer is an attribute it stands in the columns."""
    kinds = []
    data = SceneDataset(300, "question", "train")
    for index in range(300):
        sample = data[index]
        kinds.append(sample.columns["question_type"])
        if kinds[-1] in ("colour", "shape", "size"):
            assert sample.answer in sample.columns[kinds[-1]]
        if kinds[-1] == "place":
            assert sample.answer == sample.columns["place"]
    assert set(kinds) == set(QUESTION_TYPES)


def test_every_question_of_a_scene_is_a_sample() -> None:
    """As many as the scene allows, in order, the one that `"question"` draws among them; all with one picture."""
    every, one = SceneDataset(12, "questions", seed=4), SceneDataset(12, "question", seed=4)
    by_scene: dict[str, list[Sample]] = {}
    for sample in every:
        by_scene.setdefault(sample.id[:-3], []).append(sample)
    assert list(by_scene) == one.ids()
    assert every.ids() == [f"{scene}-{asked:02d}" for scene in by_scene for asked in range(len(by_scene[scene]))]
    assert len(every) == len(every.ids()) > 8 * 12
    for number, (asked, single) in enumerate(zip(by_scene.values(), one, strict=True)):
        assert (single.text, single.answer, dict(single.columns)) in [
            (s.text, s.answer, dict(s.columns)) for s in asked
        ]
        kinds = [sample.columns["question_type"] for sample in asked]
        assert kinds == sorted(set(kinds), key=QUESTION_TYPES.index)
        assert [sample.answer for sample in asked] == [truth(every.scene(number), sample.text) for sample in asked]
        assert len({id(sample.images) for sample in asked}) == 1
        assert pixels(asked[0].images) == pixels(single.images)
    assert len(list(SceneDataset(0, "questions"))) == 0


def test_the_scene_of_a_sample_is_told() -> None:
    """Also where several samples share one."""
    asked = SceneDataset(3, "questions", seed=1)
    shown = [asked.shown(index) for index in range(len(asked))]
    assert [item.place for item in shown] == [asked[index].columns["place"] for index in range(len(asked))]
    assert list(dict.fromkeys(shown)) == [asked.scene(number) for number in range(3)]


def test_counting_questions_draws_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Length and ids are known without; the data module passes the task on."""
    monkeypatch.setattr("hooked_mm.scenes.dataset.render", lambda *_: pytest.fail("a picture was drawn"))
    module = ScenesDataModule(size=5, task="questions", seed=2)
    assert len(module.ids()) == len(SceneDataset(5, "questions", seed=2)) == module.describe()["samples"]
    assert module.describe()["task"] == "questions"
    with pytest.raises(IndexError, match="sample 99 of"):
        module.scenes[99]


def test_picture_is_the_rendered_scene() -> None:
    """An RGB picture of the scene's size."""
    image = picture(scene("train", 0))
    assert (image.mode, image.size) == ("RGB", (56, 56))
    assert np.asarray(image).std() > 5


@pytest.mark.parametrize("style", STYLES)
def test_captions_of_a_style(style: str) -> None:
    """The style's prompt with its caption; the default prompt with the commonest."""
    data = SceneDataset(2, style=style)
    assert data[1].text == STYLES[style].prompt
    assert data[1].answer == caption(data.scene(1), "full" if style == "any" else style)


def test_answers_of_question_samples_are_true() -> None:
    """Also of unseen scenes, which say so in a column."""
    data = SceneDataset(40, "question", "unseen")
    for index in range(40):
        assert data[index].answer == truth(data.scene(index), str(data[index].text))
        assert data[index].columns["held_out"] is True


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"split": "tests"}, "tests"),
        ({"size": -1}, "size=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"task": "captions"}, "captions"),
        ({"style": "long"}, "long"),
        ({"count": 4}, "count=4"),
        ({"count": 0}, "count=0"),
    ],
)
def test_bad_arguments_are_refused(options: dict, named: str) -> None:
    """The error names the value."""
    with pytest.raises(BadInputError, match=named):
        SceneDataset(**{"size": 3, **options})


def test_count_is_passed_on() -> None:
    """`count` gives scenes of so many objects."""
    data = SceneDataset(20, count=2)
    assert {len(data.scene(index).objects) for index in range(20)} == {2}


def test_data_module_hands_out_every_scene_once() -> None:
    """The data module's samples are the data set in order, under the ids that it tells beforehand."""
    module = ScenesDataModule(size=7, seed=4, batch_size=3)
    assert [module.dataset[n].id for n in range(7)] == module.ids() == SceneDataset(7, seed=4).ids()
    assert len(set(module.ids())) == 7


def test_descriptions_tell_data_sets_apart() -> None:
    """What a store's manifest says of the scenes differs whenever the scenes do, and not with the batch size."""
    settings: list[dict] = [
        {},
        {"size": 6},
        {"task": "question"},
        {"split": "train"},
        {"seed": 1},
        {"count": 1},
        {"style": "place"},
    ]
    described = [str(ScenesDataModule(**{"size": 5, **options}).describe()) for options in settings]
    assert len(set(described)) == len(settings)
    assert ScenesDataModule(5, batch_size=2).describe() == ScenesDataModule(5, batch_size=4).describe()
