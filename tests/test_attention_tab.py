"""The attention tab: numbers of a plain transformers pass, clicks that choose, and LVLM-Interpret's faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from analyses.attention_tab import CLICKED, COLUMNS, STRONGEST, AttentionTab, make_tab
from analyses.tab_maps import MOST_MAPS, MOST_ROWS
from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Facts, Heat, Note, Pictures, Words
from hooked_mm.explorer.tab import View
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from tests.explored import ask, assert_same, look, made_again, told
from tests.processors import processor
from tests.tiny import picture as any_picture
from tests.tiny import tiny

TAB = make_tab([])
QUESTION = "what colour is the star ?"


@pytest.fixture(scope="module")
def asked(llava: HookedMM, images: list[Image.Image]) -> Asked:
    """An answer in which a word comes twice."""
    return told(llava, QUESTION, "a red circle and a red star", images[0])


@pytest.fixture(scope="module")
def plain(asked: Asked) -> torch.Tensor:
    """(layers, heads, q, k) of prompt and answer, as transformers returns it."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        small_model_path("llava"), attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        return torch.cat(list(model(**asked.batch.inputs, output_attentions=True).attentions))


def panels(view: View, kind: type, title: str = "") -> list[Any]:
    return [one for one in view.panels if isinstance(one, kind) and title in getattr(one, "title", "")]


def rows_of(asked: Asked) -> list[int]:
    """Of every answer token, the position in front of it."""
    first = int(asked.answer_mask[0].nonzero()[0, 0])
    return [first + number - 1 for number in asked.tokens]


def image_keys(asked: Asked) -> torch.Tensor:
    return asked.batch.mask("image")[0]


def test_layers_and_heads_are_those_of_a_plain_pass_the_first_layer_among_them(
    asked: Asked, plain: torch.Tensor
) -> None:
    """LVLM-Interpret's faults: its map of the picture begins with the second layer; rows are those that predict."""
    (heat,) = panels(look(TAB, asked), Heat, "Layers and heads")
    expected = plain[:, :, rows_of(asked)][..., image_keys(asked)].sum(-1).mean(-1)
    assert torch.allclose(heat.values.float(), expected, atol=1e-5)
    assert heat.rows == ["0", "1", "2", "3", "4", "5"]
    assert heat.picks == ("layer", "head")
    (mean,) = panels(look(TAB, asked, measure="mean"), Heat, "Layers and heads")
    assert torch.allclose(mean.values.float(), expected / 64, atol=1e-6)


def test_the_question_is_the_question_and_not_the_template_behind_it(asked: Asked, plain: torch.Tensor) -> None:
    """LVLM-Interpret's fault: all behind the picture counts as the question, the template's words for one."""
    view = look(TAB, asked, towards="question", measure="mean", layer=2, head=1)
    (heat,) = panels(view, Heat, "Layers and heads")
    names = asked.batch.tokens[0]
    start = next(place for place in range(len(names)) if names[place : place + 2] == ["what", "colour"])
    keys = list(range(start, start + 6))
    assert names[keys[-1]] == "?"
    expected = plain[:, :, rows_of(asked)][..., keys].mean((-1, -2))
    assert torch.allclose(heat.values.float(), expected, atol=1e-6)
    (words,) = panels(view, Words, "The question")
    assert [word.strip() for word, _ in words.words] == QUESTION.split()
    mean = plain[2, 1, rows_of(asked)].mean(0)[keys]
    assert [value for _, value in words.words] == pytest.approx(mean.tolist(), abs=1e-6)


def test_one_of_two_alike_tokens_is_itself(asked: Asked, plain: torch.Tensor) -> None:
    """LVLM-Interpret's fault: a token is found by its text, so the second "red" stands for both."""
    reds = [number for number in asked.tokens if asked.word(number) == "red"]
    assert len(reds) == 2
    for number in reds:
        (heat,) = panels(look(TAB, asked.choose([number])), Heat, "Layers and heads")
        row = rows_of(asked)[number]
        assert torch.allclose(heat.values.float(), plain[:, :, row][..., image_keys(asked)].sum(-1), atol=1e-5)


def test_looking_twice_finds_the_same(asked: Asked) -> None:
    """LVLM-Interpret's fault: means over tokens are added up inside the attention that is kept."""
    first, second = look(TAB, asked), look(TAB, asked)
    assert_same(first.arrays, second.arrays)


def test_heads_with_a_map_come_in_the_order_of_their_attention(asked: Asked, plain: torch.Tensor) -> None:
    """LVLM-Interpret's fault: each map is divided by its largest value first, so that flat maps come first."""
    view = look(TAB, asked, layer=3)
    (shown,) = panels(view, Pictures)
    share = plain[3][:, rows_of(asked)][..., image_keys(asked)].sum(-1).mean(-1)
    order = share.argsort(descending=True).tolist()
    assert [one.pick for one in shown.pictures] == [{"layer": 3, "head": head} for head in order]
    assert "head" in shown.pictures[0].caption
    for head in order:
        values = view.arrays[f"layer-3-head-{head}-picture-0"]
        expected = plain[3, head, rows_of(asked)].mean(0)[image_keys(asked)].reshape(8, 8)
        assert torch.allclose(values.float(), expected, atol=1e-6)


def test_the_strongest_is_looked_at_until_a_cell_is_clicked(asked: Asked, plain: torch.Tensor) -> None:
    share = plain[:, :, rows_of(asked)][..., image_keys(asked)].sum(-1).mean(-1)
    best = divmod(int(share.argmax()), 4)
    for changed, expected in (
        ({}, best),
        ({"layer": 2, "head": 3}, (2, 3)),
        ({"layer": 4}, (4, int(share[4].argmax()))),
        ({"head": 1}, (int(share[:, 1].argmax()), 1)),
    ):
        (facts,) = panels(look(TAB, asked, **changed), Facts)
        assert (dict(facts.facts)["layer"], dict(facts.facts)["head"]) == expected
    # One of few maps is that of the head that was chosen.
    worst = int(share[2].argmin())
    (shown,) = panels(look(TAB, asked, layer=2, head=worst, count=2), Pictures)
    assert worst in [one.pick["head"] for one in shown.pictures]
    assert len(shown.pictures) == 2


def test_each_token_has_its_own_map(asked: Asked, plain: torch.Tensor) -> None:
    view = look(TAB, asked, each="each", layer=1, head=2)
    (shown,) = panels(view, Pictures)
    assert [one.caption.split(":")[0] for one in shown.pictures][:3] == ["1 a", "2 red", "3 circle"]
    for number, row in zip(asked.tokens, rows_of(asked), strict=True):
        values = view.arrays[f"token-{number}-layer-1-head-2-picture-0"]
        assert torch.allclose(values, plain[1, 2, row][image_keys(asked)].reshape(8, 8), atol=1e-6)


def test_clicked_patches_are_those_below_the_points(asked: Asked, plain: torch.Tensor) -> None:
    """Two patches of the eight by eight over the square that the processor pads 48 x 72 pixels to: 12 to each side."""
    points = [(0, 1.0, 1.0), (0, 47.0, 71.0)]
    view = look(TAB, asked.choose(points=points), towards=CLICKED, layer=2, head=0)
    keys = image_keys(asked).nonzero()[[13 * 8 // 72, 7 * 8 + 59 * 8 // 72], 0]
    expected = plain[:, :, rows_of(asked)][..., keys].sum(-1)
    (heat,) = panels(view, Heat, "Layers and heads")
    assert torch.allclose(heat.values.float(), expected.mean(-1), atol=1e-5)
    (words,) = panels(view, Words, "Tokens of the answer")
    assert [value for _, value in words.words] == pytest.approx(expected[2, 0].tolist(), abs=1e-5)
    (by_head,) = panels(view, Heat, "Layer 2")
    assert by_head.rows[:2] == ["mean", "1 a"]
    assert torch.allclose(by_head.values[1:].float(), expected[2].T, atol=1e-5)
    assert torch.allclose(by_head.values[0].float(), expected[2].mean(1), atol=1e-5)


def test_without_a_click_no_patch_is_made_up(asked: Asked) -> None:
    """LVLM-Interpret's fault: where nothing was clicked, it shows the patch in the sixth row and column."""
    (note,) = look(TAB, asked, towards=CLICKED).panels
    assert isinstance(note, Note)
    assert "Choose patches" in note.text


def test_shares_of_all_kinds_add_up_and_lead_on(asked: Asked, plain: torch.Tensor) -> None:
    (heat,) = panels(look(TAB, asked), Heat, "Where attention goes")
    assert heat.columns == ["pictures", "question", "template", "answer"]
    assert torch.allclose(heat.values.sum(1), torch.ones(6, dtype=torch.float64), atol=1e-5)
    said = asked.answer_mask[0]
    expected = plain[:, :, rows_of(asked)][..., said].sum(-1).mean((1, 2))
    assert torch.allclose(heat.values[:, 3].float(), expected, atol=1e-5)
    # What a click on a column gives is something to look at.
    assert set(heat.column_values) <= set(COLUMNS)


def test_of_latents_no_patch_can_be_clicked_and_it_says_why(
    small: Callable[[str], HookedMM], images: list[Image.Image]
) -> None:
    asked = ask(small("idefics2"), QUESTION, images[0], name="idefics2", points=[(0, 5.0, 5.0)])
    with pytest.raises(BadInputError, match="latents that belong to no place"):
        look(TAB, asked, towards=CLICKED)
    (shown,) = panels(look(TAB, asked), Pictures)
    assert len(shown.pictures) == 4


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_the_python_finds_the_same_arrays(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    """Two turns with a picture each."""
    first = ask(small(name), QUESTION, images[0], name=name).conversation
    asked = ask(small(name), "describe the image .", images[1], name=name, before=first, points=[(1, 9.0, 9.0)])
    ways: list[dict[str, Any]] = [{}, {"towards": "question", "measure": "mean"}, {"each": "each", "scale": "common"}]
    (goes,) = panels(look(TAB, asked), Heat, "Where attention goes")
    assert goes.columns[-2:] == ["picture 1", "picture 2"]
    assert set(goes.column_values) <= set(COLUMNS)
    torch.testing.assert_close(goes.values[:, -2:].sum(1), goes.values[:, 0], rtol=1e-5, atol=1e-7)
    for changed in ways if name == "idefics2" else [*ways, {"towards": CLICKED, "layer": 1}]:
        view = look(TAB, asked, **changed)
        assert_same(made_again(view, asked), view.arrays)
        for one in panels(view, Pictures):
            assert all(max(own.image.size) <= 600 for own in one.pictures)


@pytest.mark.parametrize("family", ["mllama", "florence2"])
def test_pictures_that_are_read_by_cross_attention(family: str) -> None:
    """Towards the picture it is the cross-attention, towards what was said before the text's own."""
    model = HookedMM(tiny(family), processor(family), check=False)
    asked = told(model, "what is this ?", "the red circle", any_picture(40, 30), name=family)
    for towards, kind in (("image", "cross-attention"), ("answer", "self-attention"), ("question", "")):
        view = look(TAB, asked, towards=towards)
        (facts,) = panels(view, Facts)
        assert kind in dict(facts.facts)["attention"]
        assert_same(made_again(view, asked), view.arrays)
    clicked = look(TAB, asked.choose(points=[(0, 5.0, 5.0)]), towards=CLICKED)
    assert 0 < float(clicked.arrays["heads"].mean()) < 1
    if family == "mllama":
        with pytest.raises(BadInputError, match="layer 0 has no xattn"):
            look(TAB, asked, layer=0)


def test_long_answers_are_drawn_in_part_and_kept_in_whole(llava: HookedMM, images: list[Image.Image]) -> None:
    """A hundred tokens: bounded rows and maps, a note, all numbers in the arrays."""
    asked = told(llava, QUESTION, " ".join(["a red star and a blue circle"] * 15), images[0])
    assert len(asked.tokens) == 105
    view = look(TAB, asked, each="each")
    assert all(len(one.rows) <= MOST_ROWS + 1 for one in panels(view, Heat))
    assert len(panels(view, Pictures)[0].pictures) == MOST_MAPS
    assert any("first 60 of 105 tokens" in one.text for one in panels(view, Note))
    assert view.arrays["heads"].shape == (105, 6, 4)


def test_without_a_picture_there_is_still_the_question(llava: HookedMM) -> None:
    asked = ask(llava, "describe the image .")
    (note,) = look(TAB, asked).panels
    assert "no picture" in note.text  # type: ignore[union-attr]
    (heat,) = panels(look(TAB, asked, towards="question"), Heat, "Layers and heads")
    assert bool((heat.values > 0).all())
    with pytest.raises(BadInputError, match="nothing of the answer so far"):
        look(TAB, asked.choose(asked.tokens[:1]), towards="answer")


def test_it_opens_no_folders(llava: HookedMM) -> None:
    assert isinstance(TAB, AttentionTab)
    values = {control.name: control.value for control in TAB.controls(llava)}
    assert (values["layer"], values["head"]) == (STRONGEST, STRONGEST)
    with pytest.raises(BadInputError, match="opens no folders"):
        make_tab([Path(__file__)])
