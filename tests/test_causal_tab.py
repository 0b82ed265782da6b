"""The causality tab: LVLM-Interpret's controls and its faults, against transformers' eager attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from analyses import causal_tab
from analyses.attention_graphs import head_rows
from analyses.causal_explanation import explain
from analyses.causal_tab import make_tab
from analyses.targets import answer_targets
from hooked_mm.errors import UnsupportedModelError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Facts, Note, Picture, Pictures, Table, Words
from hooked_mm.explorer.tab import View
from hooked_mm.explorer.work import Stopped, Work
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from tests.explored import ask, assert_same, first_values, look, made_again, told
from tests.processors import processor
from tests.tiny import picture as any_picture
from tests.tiny import tiny

TAB = make_tab([])
LAYER, HEAD = 2, 3
"""Where the ring's colour is explained by five tokens, of which three change it."""


def of(view: View, kind: type[Any]) -> list[Any]:
    """Its panels of one kind."""
    return [panel for panel in view.panels if isinstance(panel, kind)]


def pictures(view: View) -> list[Picture]:
    """All that are shown."""
    return [one for panel in of(view, Pictures) for one in panel.pictures]


@pytest.fixture(scope="module")
def ring(llava: HookedMM, images: list[Image.Image]) -> Asked:
    """A question of one word."""
    return ask(llava, "what colour is the ring ?", images[2])


@pytest.fixture(scope="module")
def caption(llava: HookedMM, images: list[Image.Image]) -> Asked:
    """An answer of several words."""
    return ask(llava, "describe the scene in short .", images[3])


@pytest.fixture(scope="module")
def shown(ring: Asked) -> View:
    """The ring's colour."""
    return look(TAB, ring, layer=LAYER, head=HEAD, most_images=20, budget=64)


@pytest.fixture(scope="module")
def eager() -> Any:
    """The same weights with transformers' own eager attention."""
    return AutoModelForImageTextToText.from_pretrained(
        small_model_path("llava"), attn_implementation="eager", dtype=torch.float32
    )


def attention(eager: Any, asked: Asked, layer: int) -> Tensor:
    """(heads, q, k), as transformers gives it."""
    with torch.no_grad():
        return eager(**asked.batch.inputs, output_attentions=True).attentions[layer][0]


def test_lvlm_interpret_nodes_are_of_the_row_that_predicts_the_word(eager: Any, caption: Asked) -> None:
    """Of the third word, of one head: what its row attends to above the threshold; not of the word's own position."""
    view = look(TAB, caption, token=2, layer=1, head=0, threshold=0.02, most_images=6, verify=False)
    first = int(caption.batch.mask(role="answer")[0].nonzero()[0])
    row = first + 1
    own = attention(eager, caption, 1)[0]
    image = caption.batch.mask(modality="image")[0]
    behind = (image.cumsum(0) > 0) & ~image
    best = own[row].masked_fill(~image, 0).topk(6)
    nodes = {int(place) for place, weight in zip(best.indices, best.values, strict=True) if weight > 0.02}
    nodes |= {place for place in range(row) if behind[place] and own[row, place] > 0.02} | {row}
    assert view.arrays["positions"].tolist() == sorted(nodes)
    torch.testing.assert_close(view.arrays["rows"].float(), own[sorted(nodes)], atol=1e-5, rtol=1e-4)
    assert dict(of(view, Facts)[0].facts)["predicted at"] == f"position {row}"
    assert dict(of(view, Facts)[0].facts)["word"] == caption.words[2]


def test_the_head_that_looks_at_the_pictures_most_comes_first(eager: Any, ring: Asked) -> None:
    """All heads are listed by it; a click shows one's graph alone."""
    view = look(TAB, ring, verify=False)
    row = int(ring.batch.mask(role="answer")[0].nonzero()[0]) - 1
    mass = attention(eager, ring, 5)[:, row][:, ring.batch.mask(modality="image")[0]].sum(-1)
    torch.testing.assert_close(view.arrays["image_mass"].float(), mass.sort(descending=True).values, atol=1e-5, rtol=0)
    table = of(view, Table)[-1]
    best = int(mass.argmax())
    assert table.picks[0] == {"head": best, "every": False}
    assert table.rows[0][0] == f"{best} (shown)"
    assert dict(of(view, Facts)[0].facts)["head"] == best
    other = look(TAB, ring, **table.picks[1], verify=False)
    assert dict(of(other, Facts)[0].facts)["head"] == table.picks[1]["head"]
    assert [value for _, value in view.options["head"]] == [0, 1, 2, 3]


def test_lvlm_interpret_verification_is_not_left_out(shown: View, ring: Asked) -> None:
    """Which tokens change the word, to which other; they are marked in the table. Without it nothing is claimed."""
    text = of(shown, Note)[0].text
    assert "3 of 5 tokens verified (smallest)" in text
    assert "predicts 'red'" in text
    table = of(shown, Table)[0]
    assert [row[-1] for row in table.rows].count("yes") == 3 == len(shown.arrays["verified"])
    assert all(row[1] == "picture" for row in table.rows if row[-1])
    without = look(TAB, ring, layer=LAYER, head=HEAD, most_images=20, verify=False)
    assert "not verified" in of(without, Note)[0].text
    assert "verified" not in without.arrays
    assert "check(" not in without.python.split("def ")[0].split("arrays")[1]


def test_lvlm_interpret_threshold_alpha_and_search_range_are_passed_through(ring: Asked) -> None:
    """Each changes what is found, as it must."""
    base = {"layer": LAYER, "head": HEAD, "verify": False}
    nodes = [len(look(TAB, ring, **base, threshold=bound).arrays["positions"]) for bound in (0.0, 0.02, 0.5)]
    assert nodes[0] > nodes[1] > nodes[2] >= 1
    edges = [
        int((look(TAB, ring, **base, alpha=alpha, most_images=20).arrays["marks"] != 0).sum()) for alpha in (1e-12, 0.1)
    ]
    assert edges[0] < edges[1]
    near = look(TAB, ring, layer=3, head=2, verify=False, most_images=20, depth=1).arrays["explanation"]
    far = look(TAB, ring, layer=3, head=2, verify=False, most_images=20, depth=3).arrays["explanation"]
    assert set(near.tolist()) <= set(far.tolist())
    cut = look(TAB, ring, **base, most_conditions=0)
    assert any("cut short" in note.text for note in of(cut, Note))


def test_lvlm_interpret_structures_of_all_heads_are_learned(ring: Asked) -> None:
    """A row and a picture each; what is found of a head does not depend on the others."""
    view = look(TAB, ring, layer=LAYER, every=True, most_images=12, verify=False)
    table = of(view, Table)[-1]
    assert all(row[3] != "" for row in table.rows)
    assert len(of(view, Pictures)[-1].pictures) == 4
    for place, head in enumerate(view.arrays["heads"].tolist()):
        one = look(TAB, ring, layer=LAYER, head=head, most_images=12, verify=False)
        assert len(one.arrays["explanation"]) == view.arrays["explaining"][place] == table.rows[place][3]
    assert_same(made_again(view, ring), view.arrays)


def test_words_behind_the_picture_are_told_by_what_they_are(shown: View, ring: Asked) -> None:
    """From the picture's end to the row that predicts; a node is paler than what explains."""
    (words,) = of(shown, Words)
    batch, positions = ring.batch, shown.arrays["positions"].tolist()
    last = int(batch.mask(modality="image")[0].nonzero()[-1])
    row = int(batch.mask(role="answer")[0].nonzero()[0]) - 1
    assert [word.strip() for word, _ in words.words] == batch.tokens[0][last + 1 : row + 1]
    explaining = {positions[node] for node in shown.arrays["explanation"].tolist()}
    for place, (_, value) in enumerate(words.words, start=last + 1):
        if place < row:
            assert (value > 0) == (place in positions)
            assert (value > 0.5) == (place in explaining)


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_the_python_finds_the_same_again(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    """Two pictures in two turns; each kind of masking; nothing is drawn too large."""
    model = small(name)
    first = ask(model, "what colour is the ring ?", images[2], name=name)
    asked = ask(model, "what shape is green ?", images[3], name=name, before=first.conversation)
    for changed in ({"how": "mean", "budget": 8}, {"layer": 2, "budget": 8}):
        view = look(TAB, asked, most_images=12, **changed)
        assert_same(made_again(view, asked), view.arrays)
    every = pictures(view)
    assert len(every) <= causal_tab.MOST_PICTURES + 1
    assert all(max(one.image.size) <= 600 for one in every if one.caption[:5] != "right")
    assert any("latent" in note.text.lower() for note in of(view, Note)) == (name == "idefics2")
    if name == "molmo":
        assert any(one.caption.endswith("picture 2, overview") for one in every)


def test_words_and_heads_of_another_question_are_not_passed_off(ring: Asked) -> None:
    """The page still holds those of the question before; what is explained instead is said."""
    view = look(TAB, ring, token=7, head=9, layer=LAYER)
    texts = [note.text for note in of(view, Note) if note.kind == "warning"]
    assert texts[0] == "There is no word 7 here; explained is 0."
    best = int(view.arrays["heads"][0])
    assert texts[1] == f"There is no head 9 here; explained is {best}."
    assert dict(of(view, Facts)[0].facts)["head"] == best


def test_without_a_picture_there_is_nothing_to_explain_by(llava: HookedMM) -> None:
    """It is said in words."""
    assert "no picture" in of(look(TAB, ask(llava, "what colour is the star ?")), Note)[0].text


def test_a_wide_graph_is_drawn_in_part_and_said(ring: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest tokens remain."""
    monkeypatch.setattr(causal_tab, "MOST_DRAWN", 2)
    view = look(TAB, ring, layer=LAYER, head=HEAD, most_images=20, verify=False)
    assert any("nearest 2 of 5" in note.text for note in of(view, Note))


def test_what_can_not_be_masked_is_still_explained(ring: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is there; why it was not verified stands beside it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedModelError("layers [1] of this model have no attention pattern to cut")

    monkeypatch.setattr(causal_tab, "check", refuse)
    view = look(TAB, ring, layer=LAYER, head=HEAD, most_images=20)
    assert any(note.kind == "warning" and "no attention pattern" in note.text for note in of(view, Note))
    assert len(view.arrays["explanation"]) == 5
    assert_same(made_again(view, ring), view.arrays)


@pytest.mark.parametrize("at", ["testing independences", "masking"])
def test_it_can_be_stopped(ring: Asked, at: str) -> None:
    """Between two tests, and between two passes."""

    class Stopping(Work):
        def step(self, told: str, done: int | None = None, total: int | None = None) -> None:
            if told.startswith(at) and (done or at == "masking"):
                self.stop()
            super().step(told, done, total)

    values = first_values(TAB, ring.model, layer=LAYER, head=HEAD, most_images=20)
    with pytest.raises(Stopped):
        TAB.look(ring, values, Stopping())


def test_every_test_is_told_before_it_is_made(ring: Asked) -> None:
    """Numbers from 0 on, as many as the graph says it cost."""
    view = look(TAB, ring, layer=LAYER, head=HEAD, most_images=20, verify=False)
    (held,) = head_rows(ring.model, ring.batch, answer_targets(ring.batch, [0]), LAYER, [HEAD], most_images=20)
    counted: list[int] = []
    told = explain(held.rows, held.nodes, tell=counted.append)
    assert counted == list(range(sum(told.learned.tests)))
    assert dict(of(view, Facts)[0].facts)["tests"] == len(counted)


@pytest.mark.parametrize(("family", "why"), [("mllama", "cross-attention"), ("florence2", "encoder-decoder")])
def test_rows_that_do_not_hold_both_are_refused(family: str, why: str) -> None:
    """No graph joins what no row of attention joins; the reason is told."""
    model = HookedMM(tiny(family), processor(family), check=False)
    asked = told(model, "what is this ?", "the red circle", any_picture(40, 30), name=family)
    with pytest.raises(UnsupportedModelError, match=why):
        look(TAB, asked)
