"""The relevancy tab: Chefer's rules by hand, token by token; LVLM-Interpret's faults; stopped between two tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from analyses.relevancy_tab import TEXT, THROUGH, TOWER, make_tab
from analyses.tab_maps import MEAN, MOST_TOKENS
from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Facts, Heat, Note, Pictures, Table, Words
from hooked_mm.explorer.tab import View
from hooked_mm.explorer.work import Stopped, Work
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from tests.chefer_by_hand import Attentions
from tests.explored import ask, assert_same, first_values, look, made_again, told
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
def by_hand(asked: Asked) -> torch.Tensor:
    """(tokens, positions): Chefer's rule 6, with gradients of the logit of each token alone."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        small_model_path("llava"), dtype=torch.float64, attn_implementation="eager"
    )
    paths = [f"model.language_model.layers.{number}.self_attn" for number in range(6)]
    inputs = {
        name: value.double() if value.is_floating_point() else value for name, value in asked.batch.inputs.items()
    }
    first = int(asked.answer_mask[0].nonzero()[0, 0])
    found = []
    with Attentions(model, paths) as attentions:
        logits = model(**inputs).logits[0]
        for number in asked.tokens:
            row = first + number - 1
            score = logits[row, asked.batch.input_ids[0, first + number]]
            kept = [attentions.kept[path] for path in paths]
            gradients = torch.autograd.grad(score, kept, retain_graph=True)
            relevancy = torch.eye(len(logits), dtype=torch.float64)
            for value, gradient in zip(kept, gradients, strict=True):
                weighted = (value[0].detach() * gradient[0]).clamp_min(0).mean(0)
                relevancy = relevancy + weighted @ relevancy
            own = relevancy[row] - torch.eye(len(logits), dtype=torch.float64)[row]
            found.append(own / own.sum())
    return torch.stack(found)


def panels(view: View, kind: type, title: str = "") -> list[Any]:
    return [one for one in view.panels if isinstance(one, kind) and title in getattr(one, "title", "")]


def test_every_token_rests_on_what_the_rule_says_by_hand(asked: Asked, by_hand: torch.Tensor) -> None:
    """LVLM-Interpret's faults: gradients of all tokens are added up, and tokens alike are one."""
    view = look(TAB, asked)
    torch.testing.assert_close(view.arrays["positions"].double(), by_hand, rtol=2e-3, atol=1e-5)
    image = asked.batch.mask("image")[0]
    for number in asked.tokens:
        values = view.arrays[f"token-{number}-picture-0"].double()
        torch.testing.assert_close(values, by_hand[number, image].reshape(8, 8), rtol=2e-3, atol=1e-5)
    (heat,) = panels(view, Heat, "rests on")
    assert heat.columns == ["picture", "question", "template", "answer"]
    assert heat.rows[1:3] == ["2 red", "3 circle"]
    torch.testing.assert_close(heat.values[:, 0], by_hand[:, image].sum(1), rtol=2e-3, atol=1e-5)
    assert torch.allclose(heat.values.sum(1), torch.ones(7, dtype=torch.float64))
    assert (heat.picks, list(heat.row_values)) == (("token", None), list(asked.tokens))


def test_the_tokens_that_rest_most_on_the_picture_come_first(asked: Asked, by_hand: torch.Tensor) -> None:
    view = look(TAB, asked)
    share = by_hand[:, asked.batch.mask("image")[0]].sum(1)
    (facts,) = panels(view, Facts)
    best = int(share.argmax())
    assert dict(facts.facts)["rest most on the picture"].startswith(f"{best + 1} {asked.word(best)} (")
    (words,) = panels(view, Words, "Tokens of the answer")
    assert [word for word, _ in words.words] == list(asked.words)
    assert [value for _, value in words.words] == pytest.approx(share.tolist(), rel=2e-3, abs=1e-5)
    assert [pick["token"] for pick in words.picks] == list(asked.tokens)


def test_words_are_those_of_the_token_that_was_clicked(asked: Asked, by_hand: torch.Tensor) -> None:
    """Of one token, or the mean; a number of another answer's token is the mean."""
    there = asked.batch.mask("text")[0]
    for token in (1, MEAN, 99):
        view = look(TAB, asked, token=token)
        (words,) = panels(view, Words, "relevancy to")
        chosen = by_hand[[token]] if token in asked.tokens else by_hand
        mean = chosen.mean(0)
        text = [value for word, value in words.words if not word.startswith("[picture")]
        assert text == pytest.approx(mean[there].tolist(), rel=2e-3, abs=1e-5)
        assert dict(words.words)["[picture 1]"] == pytest.approx(float(mean[~there].sum()), rel=2e-3)
        assert view.options["token"][1:3] == [("1 a", 0), ("2 red", 1)]
    (table,) = panels(view, Table)
    question = by_hand[1].masked_fill(~there, 0)
    assert table.rows[1][2].startswith(asked.batch.tokens[0][int(question.argmax())])
    assert table.rows[1][3] == pytest.approx(float(by_hand[1][~there].max()), rel=2e-3)


def test_a_token_is_the_same_alone_and_among_others(asked: Asked) -> None:
    every, alone = look(TAB, asked), look(TAB, asked.choose([5]))
    torch.testing.assert_close(alone.arrays["positions"][0], every.arrays["positions"][5], rtol=1e-4, atol=1e-7)
    (shown,) = panels(alone, Pictures)
    assert len(shown.pictures) == 1


def test_choices_change_what_is_found(asked: Asked) -> None:
    """Down to the tower's patches, by the tower alone, of the log-probability, without division."""
    few = asked.choose([1, 2])
    found = [
        look(TAB, few, **changed).arrays
        for changed in ({}, {"where": THROUGH}, {"where": TOWER}, {"kind": "log_prob"}, {"normalise": False})
    ]
    # The tower's map has a patch per token here.
    maps = [one["token-1-picture-0"].double() for one in found]
    assert {tuple(one.shape) for one in maps} == {(8, 8)}
    for number, one in enumerate(maps):
        for other in maps[number + 1 :]:
            assert not torch.allclose(one, other, rtol=1e-2)
    torch.testing.assert_close(found[0]["positions"], found[2]["positions"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_the_python_finds_the_same_arrays(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    """Two turns with a picture each."""
    first = ask(small(name), QUESTION, images[0], name=name).conversation
    asked = ask(small(name), "describe the image .", images[1], name=name, before=first)
    for changed in ({}, {"where": TOWER, "normalise": False}):
        view = look(TAB, asked.choose(asked.tokens[:1]), **changed)
        assert_same(made_again(view, asked), view.arrays)
        assert {one.caption.split(",")[1][:10] for one in panels(view, Pictures)[0].pictures} == {
            " picture 1",
            " picture 2",
        }


@pytest.mark.parametrize(("family", "shares"), [("mllama", False), ("florence2", True)])
def test_pictures_that_are_read_by_cross_attention(family: str, shares: bool) -> None:
    """Beside the text there are no shares of both; through an encoder there are. What was said before is told, too."""
    model = HookedMM(tiny(family), processor(family), check=False)
    asked = told(model, "what is this ?", "the red", any_picture(40, 30), name=family)
    view = look(TAB, asked)
    assert_same(made_again(view, asked), view.arrays)
    assert bool(panels(view, Words, "rests on the picture")) == shares
    assert any("cross-attention, beside the text" in one.text for one in panels(view, Note)) != shares
    assert bool(panels(view, Words, "The answer so far")) == shares
    assert panels(view, Pictures)


def test_it_stops_between_two_tokens(asked: Asked) -> None:
    class Watched(Work):
        def step(self, told: str, done: int | None = None, total: int | None = None) -> None:
            steps.append((told, done, total))
            if done == 2:
                self.stop()
            super().step(told, done, total)

    steps: list[tuple[str, int | None, int | None]] = []
    with pytest.raises(Stopped):
        TAB.look(asked, first_values(TAB, asked.model), Watched())
    assert steps[-1] == ("a backward pass for token 3 of 7", 2, 7)
    # Nothing of the run that was stopped is left behind.
    assert_same(look(TAB, asked.choose([0])).arrays, look(TAB, asked.choose([0])).arrays)


def test_long_answers_are_explained_in_part(llava: HookedMM, images: list[Image.Image]) -> None:
    asked = told(llava, QUESTION, " ".join(["red star"] * 17), images[0])
    view = look(TAB, asked)
    assert view.arrays["positions"].shape[0] == MOST_TOKENS
    assert any(f"first {MOST_TOKENS} of 34" in one.text for one in panels(view, Note))


def test_without_a_picture_words_remain(llava: HookedMM) -> None:
    asked = ask(llava, "describe the image .")
    view = look(TAB, asked)
    assert not panels(view, Pictures)
    assert any("there is no picture" in one.text for one in panels(view, Note))
    assert panels(view, Words, "relevancy to")
    assert_same(made_again(view, asked), view.arrays)
    (note,) = look(TAB, asked, where=THROUGH).panels
    assert "no picture in this conversation" in note.text  # type: ignore[union-attr]


def test_a_tower_without_a_rule_is_refused_with_the_reason_and_the_text_is_not() -> None:
    model = HookedMM(tiny("florence2"), processor("florence2"), check=False)
    asked = told(model, "what is this ?", "the red", any_picture(40, 30), name="florence2")
    with pytest.raises(BadInputError, match="mixes them without attention"):
        look(TAB, asked, where=THROUGH)
    assert panels(look(TAB, asked, where=TEXT), Pictures)


def test_it_opens_no_folders() -> None:
    with pytest.raises(BadInputError, match="opens no folders"):
        make_tab([Path(__file__)])
