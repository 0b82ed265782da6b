"""What tabs with maps share: large pictures are drawn small, few of many, in one scale or each in its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from analyses.picture_maps import PictureMap
from analyses.tab_maps import (
    MEAN,
    MOST_MAPS,
    MOST_WORDS,
    Drawing,
    bounded,
    drawn,
    lacking,
    map_arrays,
    named,
    percents,
    position_maps,
    shares_table,
    text_words,
    token_choice,
    top_words,
)
from hooked_mm.explorer.panels import Note, Pictures
from hooked_mm.hooked import HookedMM
from tests.explored import ask, told

GREY = Image.new("RGB", (40, 60), (120, 120, 120))


def one(values: list[list[float]], image: Image.Image = GREY, **options: object) -> PictureMap:
    box = (0.0, 0.0, float(image.width), float(image.height))
    return PictureMap(**{"picture": 0, "overview": False, "values": torch.tensor(values), "box": box} | options)  # type: ignore[arg-type]


def colour(image: Image.Image) -> np.ndarray:
    """How far each pixel is from grey."""
    pixels = np.asarray(image).astype(int)
    return pixels.max(2) - pixels.min(2)


def pictures(panels: list) -> list[Image.Image]:
    return [own.image for own in panels[0].pictures]


def test_a_weak_map_shows_in_its_own_scale_and_not_in_that_of_all() -> None:
    weak, strong = Drawing("weak", [one([[0.0, 0.01]])]), Drawing("strong", [one([[0.0, 1.0]])])
    own, common = (pictures(drawn([weak, strong], [GREY], scale)) for scale in ("own", "common"))
    assert (colour(own[0]) == colour(own[1])).all()
    assert colour(common[1]).max() > 100
    assert colour(common[0]).max() < 20


def test_large_pictures_are_drawn_small_and_the_box_keeps_its_place() -> None:
    """A map of the right half of a picture of 4000 x 3000 pixels colours the right half."""
    large = Image.new("RGB", (4000, 3000), (120, 120, 120))
    half = one([[1.0, 0.0], [1.0, 1.0]], box=(2000.0, 0.0, 4000.0, 3000.0))
    (image,) = pictures(drawn([Drawing("half", [half])], [large]))
    assert max(image.size) <= 600
    assert abs(image.width / image.height - 4 / 3) < 0.01
    found = colour(image) > 30
    assert not found[:, : image.width // 2 - 1].any()
    assert found[:, image.width // 2 :].mean() > 0.5


def test_no_more_maps_are_drawn_than_can_be_seen_and_a_note_says_so() -> None:
    many = [Drawing(str(number), [one([[0.0, float(number)]])]) for number in range(1, MOST_MAPS + 6)]
    shown, note = drawn(many, [GREY])
    assert isinstance(shown, Pictures)
    assert len(shown.pictures) == MOST_MAPS
    assert isinstance(note, Note)
    assert f"{MOST_MAPS} of {MOST_MAPS + 5} maps" in note.text
    assert len(drawn(many[:MOST_MAPS], [GREY])) == 1
    assert drawn([], [GREY]) == []


def test_empty_maps_are_said_to_be_empty_and_signs_have_two_colours() -> None:
    (empty,) = drawn([Drawing("none", [one([[0.0, 0.0]])])], [GREY])
    assert isinstance(empty, Pictures)
    assert "empty: 0 everywhere" in empty.pictures[0].caption
    (image,) = pictures(drawn([Drawing("both", [one([[-1.0, 1.0]])])], [GREY]))
    left, right = np.asarray(image)[:, 20].mean(0), np.asarray(image)[:, -20].mean(0)
    assert left[2] > left[0]
    assert right[0] > right[2]


def test_captions_tell_pictures_and_overviews_apart() -> None:
    maps = [one([[0.0, 1.0]]), one([[0.0, 2.0]], overview=True), one([[0.0, 3.0]], picture=1)]
    (panel,) = drawn([Drawing("red", maps, {"token": 3})], [GREY, GREY], title="Maps")
    assert isinstance(panel, Pictures)
    starts = [own.caption.split(":")[0] for own in panel.pictures]
    assert starts == ["red, picture 1", "red, picture 1, overview", "red, picture 2"]
    assert {tuple((own.pick or {}).items()) for own in panel.pictures} == {(("token", 3),)}
    names = ["token-0-picture-0", "token-0-picture-0-overview", "token-0-picture-1"]
    assert list(map_arrays("token-0", maps)) == names


def test_a_word_that_is_said_twice_is_two_tokens(llava: HookedMM, images: list[Image.Image]) -> None:
    """LVLM-Interpret's fault: tokens are found by their text, so of two alike the last is always meant."""
    asked = told(llava, "what is this ?", "red circle and red star", images[0])
    names = named(asked, asked.tokens)
    assert names == ["1 red", "2 circle", "3 and", "4 red", "5 star"]
    assert bounded(asked) == (asked.tokens, [])
    few, (note,) = bounded(asked, 2)
    assert few == (0, 1)
    assert isinstance(note, Note)
    assert "first 2 of 5" in note.text
    chosen, options = token_choice(asked, few, 1)
    assert (chosen, options[1:]) == (1, [("1 red", 0), ("2 circle", 1)])
    for stale in (4, MEAN, None, "2 circle"):
        assert token_choice(asked, few, stale)[0] == MEAN


def test_an_answer_without_words_and_a_question_without_pictures_are_told(llava: HookedMM, scenes: object) -> None:
    asked = ask(llava, "describe the image .")
    assert lacking(asked, pictures=False) is None
    for found, text in (
        (lacking(asked, pictures=True), "no picture"),
        (lacking(told(llava, "what ?", "</s>"), pictures=False), "no words"),
    ):
        assert found is not None
        (note,) = found.panels
        assert isinstance(note, Note)
        assert text in note.text


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "molmo"])
def test_words_of_a_prompt_hold_all_values_and_pictures_stand_once(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    model = small(name)
    batch = model.prepare([images[:2]], "what colour is the star ?", answers=["red"])
    values = torch.rand(batch.length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    words = text_words(model, batch, values)
    assert sum(value for _, value in words) == pytest.approx(float(values[batch.mask()[0]].sum()))
    assert [word for word, _ in words if word.startswith("[picture")] == ["[picture 1]", "[picture 2]"]
    index = batch.image_index[0]
    assert dict(words)["[picture 2]"] == pytest.approx(float(values[index == 1].sum()))
    question = text_words(model, batch, values, batch.mask(role="question")[0])
    assert [word.strip() for word, _ in question] == "what colour is the star ?".split()
    assert question[0][1] == pytest.approx(float(values[batch.mask(role="question")[0].nonzero()[0, 0]]))


def test_no_more_words_are_shown_than_can_be_read(llava: HookedMM) -> None:
    batch = llava.prepare([None], " ".join(["star"] * (MOST_WORDS + 50)))
    words = text_words(llava, batch, torch.arange(batch.length).double())
    assert len(words) == MOST_WORDS
    assert words[-1][1] == batch.length - 1


def test_latents_are_laid_over_patches_for_many_tokens_in_one_go(
    small: Callable[[str], HookedMM], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connector's map is made once, and is of each row what it is of that row alone."""
    import analyses.tab_maps as module

    model, calls = small("idefics2"), 0
    real = module.connector_map

    def counted(*given: object) -> object:
        nonlocal calls
        calls += 1
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "connector_map", counted)
    batch = model.prepare(images[0], "what is this ?")
    values = torch.rand(3, batch.length, generator=torch.Generator().manual_seed(1))
    found = position_maps(model, batch, values, images[:1])
    assert calls == 1
    (alone,) = position_maps(model, batch, values[1:2], images[:1])
    assert torch.equal(found[1][0].values, alone[0].values)
    # What is handed on is all there is.
    total = float(values[1][batch.mask("image")[0]].sum())
    assert float(alone[0].values.nansum()) == pytest.approx(total, rel=1e-4)


@given(st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=1, max_size=5))
def test_percents_are_whole_and_nothing_where_nothing_is_known(values: list[float]) -> None:
    (row,) = percents(torch.tensor([values], dtype=torch.float64))
    for text, value in zip(row, values, strict=True):
        assert (text == "") == (value != value)
        assert not text or abs(int(text) - 100 * value) <= 0.5


def test_small_tables() -> None:
    table, names = shares_table({"image": torch.tensor([0.5, 0.25]), "question": torch.tensor([0.5, 0.75])})
    assert names == ["image", "question"]
    assert table.tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert top_words([(" a", 0.1), ("b", 0.5), ("c", 0.0), ("\n", 0.2)]) == "b 0.500, '\\n' 0.200, a 0.100"
