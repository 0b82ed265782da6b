"""The lens tab, against transformers' own hidden states; its Python, its bounds, its refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from analyses import lens_tab
from analyses.lens_tab import make_tab
from hooked_mm.errors import UnknownWordError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.conversation import Generation
from hooked_mm.explorer.panels import Heat, Note, Pictures, Table
from hooked_mm.explorer.tab import View
from hooked_mm.explorer.work import Stopped, Work
from hooked_mm.hooked import HookedMM
from tests.explored import ask, assert_same, first_values, look, made_again, told
from tests.processors import processor
from tests.tiny import picture as any_picture
from tests.tiny import tiny

TAB = make_tab([])
Small = Callable[[str], HookedMM]


def of(view: View, kind: type[Any]) -> list[Any]:
    """Its panels of one kind."""
    return [panel for panel in view.panels if isinstance(panel, kind)]


def by_hand(asked: Asked) -> Tensor:
    """Probabilities (layers, p, vocab) from transformers' hidden states: the last are normed already."""
    model = asked.model.hf_model
    with torch.no_grad():
        states = model(**asked.batch.inputs, output_hidden_states=True).hidden_states
        normed = [model.model.language_model.norm(state[0]) for state in states[:-1]] + [states[-1][0]]
        return torch.stack([model.get_output_embeddings()(state).softmax(-1) for state in normed])


@pytest.fixture(scope="module")
def captioned(llava: HookedMM, images: list[Image.Image]) -> Asked:
    """A caption of several words."""
    return ask(llava, "describe the scene in short .", images[1], generation=Generation(max_new_tokens=8))


def test_rows_are_those_that_predict_the_chosen_words(captioned: Asked) -> None:
    """A column is headed by a word of the answer; its cells are of the position before it."""
    asked = captioned.choose(tokens=captioned.numbers[1:])
    (heat,) = of(look(TAB, asked), Heat)
    truth = by_hand(asked)
    first = int(asked.batch.mask(role="answer")[0].nonzero()[0])
    places = [first - 1 + number for number in asked.tokens]
    assert heat.columns == list(asked.words[1:])
    assert heat.column_values == places
    torch.testing.assert_close(heat.values, truth[:, places].amax(-1), atol=1e-5, rtol=1e-4)
    tokenizer = asked.model.tokenizer
    assert [[tokenizer.decode([int(token)]).strip() for token in row] for row in truth[:, places].argmax(-1)] == [
        list(row) for row in heat.texts
    ]
    # What was said greedily is what the last layer says there, and nowhere beside it.
    assert list(heat.texts[-1]) == [word.strip() for word in asked.words[1:]]


def test_entropy_and_a_followed_word(captioned: Asked) -> None:
    """Both by hand; the prompt's positions have their own words as heads."""
    view = look(TAB, captioned, where="prompt", shown="entropy", word="red")
    entropy, followed = of(view, Heat)
    truth, batch = by_hand(captioned), captioned.batch
    places = [n for n, role in enumerate(batch.role[0].tolist()) if role in (1, 2)]
    assert entropy.column_values == places
    assert [batch.tokens[0][place].strip("▁Ġ ") for place in places] == [name.strip() for name in entropy.columns]
    own = truth[:, places]
    torch.testing.assert_close(entropy.values, -(own * own.log()).sum(-1), atol=1e-4, rtol=1e-4)
    assert entropy.peak == math.log(captioned.model.cfg.d_vocab)
    (red,) = captioned.model.tokenizer("red", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(followed.values, own[..., red], atol=1e-6, rtol=1e-4)


def test_words_of_patches_lie_where_the_patches_lie(captioned: Asked) -> None:
    """Row by row from the picture's top left corner; the table counts the words; maps have the word's probability."""
    view = look(TAB, captioned, where="patches", layer=4, word="red")
    truth, start = by_hand(captioned), int(captioned.batch.mask(modality="image")[0].nonzero()[0])
    own = truth[4, start : start + 64]
    said = [captioned.model.tokenizer.decode([int(token)]).strip()[:8] for token in own.argmax(-1)]
    (heat,), (table,), (maps,) = of(view, Heat), of(view, Table), of(view, Pictures)
    assert [text.rstrip("…")[:7] for row in heat.texts for text in row] == [text[:7] for text in said]
    torch.testing.assert_close(heat.values.flatten(), own.amax(-1), atol=1e-5, rtol=1e-4)
    assert sum(row[1] for row in table.rows) <= 64
    assert table.rows[0][1] == max(own.argmax(-1).bincount()).item()
    (red,) = captioned.model.tokenizer("red", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(view.arrays["maps_followed"], truth[:, start : start + 64, red], atol=1e-6, rtol=1e-4)
    low, high = float(truth[2, start : start + 64, red].min()), float(truth[2, start : start + 64, red].max())
    assert maps.pictures[2].caption == f"layer 2: {low:.3g} to {high:.3g}"
    assert [one.pick for one in maps.pictures] == [{"layer": n} for n in range(7)]


def test_a_chosen_patch_has_all_its_layers(captioned: Asked) -> None:
    """The patch in row 2, column 5 of 8 x 8, and its first words when it is clicked."""
    width, height = captioned.images[0].size
    asked = captioned.choose(points=[(0, width * 5.5 / 8, height * 2.5 / 8)])
    place = int(asked.batch.mask(modality="image")[0].nonzero()[0]) + 2 * 8 + 5
    view = look(TAB, asked, where="patches", layer=3, position=place)
    heat, truth = of(view, Heat)[1], by_hand(asked)
    assert heat.column_values == [place]
    torch.testing.assert_close(heat.values[:, 0], truth[:, place].amax(-1), atol=1e-5, rtol=1e-4)
    closer = of(view, Table)[-2] if of(view, Table)[-1].columns[0] == "first word" else of(view, Table)[-1]
    best = truth[3, place].topk(10)
    assert [row[2] for row in closer.rows] == pytest.approx(best.values.tolist(), rel=1e-4, abs=1e-6)
    assert view.options["position"] == [(f"{place}: picture: 8 x 8 patches, row 2, column 5", place)]


def test_words_the_model_can_not_say(captioned: Asked) -> None:
    """A word that the tokenizer can't make is refused; of several tokens the first is followed, and said so."""
    with pytest.raises(UnknownWordError, match="giraffe"):
        look(TAB, captioned, word="giraffe")
    view = look(TAB, captioned, word="red star")
    assert "the first, 'red'" in of(view, Note)[0].text
    one = look(TAB, captioned, word="red")
    assert_same({"followed": view.arrays["followed"]}, {"followed": one.arrays["followed"]})


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_the_python_finds_the_same_again(small: Small, images: list[Image.Image], name: str) -> None:
    """Two turns with a picture each, every kind of position; words of both grids of Molmo, of latents without place."""
    model = small(name)
    first = ask(model, "describe the image .", images[0], name=name)
    asked = ask(model, "what colour is the star ?", images[1], name=name, before=first.conversation)
    asked = asked.choose(points=[(0, 20, 20), (1, 30, 10)])
    for where in lens_tab.WHERE if name == "llava" else ["patches"]:
        view = look(TAB, asked, where=where, word="red", layer=4)
        assert_same(made_again(view, asked), view.arrays)
    (maps,) = of(view, Pictures)
    assert len(maps.pictures) == 7 * (4 if name == "molmo" else 2)
    assert all(max(one.image.size) <= 600 for panel in of(view, Pictures) for one in panel.pictures)
    placed = [panel for panel in of(view, Heat) if panel.corner == "row \\ column"]
    assert len(placed) == {"idefics2": 0, "molmo": 4}.get(name, 2)
    if name == "idefics2":
        assert any("latent" in note.text for note in of(view, Note))
        assert len(of(view, Heat)[0].columns) == min(64, int(asked.batch.mask(modality="image").sum()))


def test_without_a_picture(llava: HookedMM) -> None:
    """There are no patches, and it is said; words are read all the same."""
    asked = ask(llava, "what colour is the star ?")
    assert "no picture" in of(look(TAB, asked, where="patches"), Note)[0].text
    assert of(look(TAB, asked), Heat)[0].columns == list(asked.words)


def test_what_is_drawn_is_bounded_and_said(
    captioned: Asked, images: list[Image.Image], llava: HookedMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long answer the first words; of a long prompt the last; a huge picture is drawn small."""
    monkeypatch.setattr(lens_tab, "MOST_COLUMNS", 3)
    for where, words in (("answer", captioned.words[:3]), ("prompt", None)):
        view = look(TAB, captioned, where=where)
        (heat,), (note,) = of(view, Heat), of(view, Note)
        assert heat.values.shape == (7, 3)
        assert "3 of" in note.text
        assert words is None or heat.columns == list(words)
        assert_same(made_again(view, captioned), view.arrays)
    assert heat.column_values[-1] == int(captioned.prompt.modality.shape[1]) - 1
    huge = ask(llava, "describe the image .", images[0].resize((1600, 1200)))
    view = look(TAB, huge, where="patches", word="red")
    assert all(max(one.image.size) <= 600 for panel in of(view, Pictures) for one in panel.pictures)


def test_it_can_be_stopped_between_layers(captioned: Asked) -> None:
    """A large vocabulary takes time after the model has run."""
    work, seen = Work(), []

    class Stopping(Work):
        def step(self, told: str, done: int | None = None, total: int | None = None) -> None:
            seen.append(told)
            if done == 2:
                self.stop()
            super().step(told, done, total)

    work = Stopping()
    with pytest.raises(Stopped):
        TAB.look(captioned, first_values(TAB, captioned.model), work)
    assert seen[-1] == "reading layers through the lens"


def test_a_position_of_another_question_is_not_guessed(captioned: Asked) -> None:
    """It is said that it is not there."""
    view = look(TAB, captioned, position=999)
    assert of(view, Note)[0].kind == "warning"
    assert not of(view, Table)


@pytest.mark.parametrize(("family", "why"), [("mllama", "text reads"), ("florence2", "there is nothing to read there")])
def test_text_that_holds_no_part_of_a_picture(family: str, why: str) -> None:
    """By cross-attention, or as the decoder of an encoder: its words are read, patches there are none."""
    model = HookedMM(tiny(family), processor(family), check=False)
    asked = told(model, "what is this ?", "the red circle", any_picture(40, 30), name=family)
    view = look(TAB, asked)
    assert of(view, Heat)[0].columns == list(asked.words)
    assert_same(made_again(view, asked), view.arrays)
    assert why in of(look(TAB, asked, where="patches"), Note)[0].text
