"""One tab on the page: a component per control, what a click in its panels sets, what it offers for download."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import gradio
import pytest
import torch
from PIL import Image

from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.conversation import Generation, ModelName
from hooked_mm.explorer.desk import Desk, Question
from hooked_mm.explorer.panels import Facts, Heat
from hooked_mm.explorer.tab import Choice, Control, Number, Text, Toggle, View
from hooked_mm.explorer.tab_area import TabArea, changed, component
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM

LLAVA = ModelName("small", "llava")


class Told:
    """A tab that shows what it was asked."""

    name, title, about, order = "told", "Told", "what was <asked>", 1

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """One of each kind."""
        return [
            Number("layer", "Layer", 0, model.cfg.n_layers - 1, 0),
            Choice("which", "Which", [], None, changing=True),
            Text("word", "Word", "a"),
        ]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> View:
        """A cell per layer, and the values as they came."""
        if values["word"] == "wrong":
            raise BadInputError("'wrong' is <wrong>")
        heat = Heat(torch.ones(2, 1), ["0", "1"], ["x"], picks=("layer", None))
        facts = Facts([(name, str(value)) for name, value in values.items()])
        arrays = {"tokens": torch.tensor(asked.tokens)}
        return View([facts, heat], "arrays = {}", arrays, {"which": [("one", 1), ("two", 2)]})


@pytest.fixture
def area(llava: HookedMM) -> Iterator[TabArea]:
    """The tab's part of a page."""
    desk = Desk([LLAVA], [Told()])
    desk._loaded[LLAVA] = llava
    with gradio.Blocks():
        made = TabArea(desk, Told(), llava)
    yield made
    desk.close()


def visitor(area: TabArea, images: list[Image.Image], key: str = "a") -> Any:
    """A request of somebody who has asked."""
    visit = area.desk.visits.of(key)
    for _ in area.desk.ask(visit, Question("describe the scene .", (images[0],), Generation(max_new_tokens=4))):
        pass
    return SimpleNamespace(session_hash=key)


@pytest.mark.parametrize(
    ("control", "kind"),
    [
        (Number("n", "N", 0, 3, 1), gradio.Slider),
        (Choice("c", "C", [("a", 1), ("b", 2)], 1), gradio.Radio),
        (Choice("c", "C", [(str(n), n) for n in range(5)], 1), gradio.Dropdown),
        (Choice("c", "C", [], None, changing=True), gradio.Dropdown),
        (Text("t", "T", "x"), gradio.Textbox),
        (Toggle("b", "B", True), gradio.Checkbox),
    ],
)
def test_every_control_has_its_component(control: Control, kind: type) -> None:
    """With its value, label and address; of another model it gets that one's range."""
    with gradio.Blocks():
        made = component(control, "hm-tab")
    assert isinstance(made, kind)
    assert (made.value, made.label, made.elem_id) == (control.value, control.label, f"hm-tab-{control.name}")
    assert changed(control)["value"] == control.value


def test_another_models_controls_have_its_range(area: TabArea, llava: HookedMM) -> None:
    """A slider of layers ends at the last one; after another answer of the same model it stays where it is."""
    deeper = SimpleNamespace(cfg=SimpleNamespace(n_layers=31))
    assert area.fresh(deeper, every=True)[area.controls["layer"]]["maximum"] == 30
    assert area.controls["layer"] not in area.fresh(llava)


def test_what_was_offered_for_an_earlier_answer_is_offered_no_more(area: TabArea, llava: HookedMM) -> None:
    """Options that came with a view go with it."""
    assert area.fresh(llava)[area.controls["which"]] == gradio.update(choices=[], value=None)


def test_looking_shows_what_the_tab_found_and_its_new_options(area: TabArea, images: list[Image.Image]) -> None:
    """Values reach the tab as they were set; a choice that is offered no longer is let go."""
    request = visitor(area, images)
    *_, last = area._look(request, [], [], 1, 7, "b")
    assert all(text in last[area.result] for text in (">1<", ">b<"))
    assert last[area.controls["which"]] == gradio.update(choices=[("one", 1), ("two", 2)], value=None)
    *_, last = area._look(request, [], [], 1, 2, "b")
    assert last[area.controls["which"]]["value"] == 2


def test_a_click_sets_the_control_and_looks_again(area: TabArea, images: list[Image.Image]) -> None:
    """Only controls of this tab are set, whatever is sent; a click on nothing does nothing."""
    request = visitor(area, images)
    event = SimpleNamespace(pick={"layer": 4, "password": "x"})
    first, *_, last = area._picked(event, request, [], [], 0, None, "a")
    assert first == {area.controls["layer"]: 4}
    assert ">4<" in last[area.result]
    for nothing in ({}, {"password": 1}, None, "layer", ["layer"]):
        shown = list(area._picked(SimpleNamespace(pick=nothing), request, [], [], 0, None, "a"))
        assert shown == [{area.status: ""}]


@pytest.mark.parametrize("wrong", [99, -1, "1", None, {"a": 1}, [1], True, float("nan")])
def test_a_value_that_no_control_has_is_refused(area: TabArea, images: list[Image.Image], wrong: Any) -> None:
    """However it was sent: the tab never sees it."""
    *_, last = area._picked(SimpleNamespace(pick={"layer": wrong}), visitor(area, images), [], [], 0, None, "a")
    assert "Layer" in last[area.result]
    assert "hm-heat" not in last[area.result]


def test_what_a_tab_refuses_stands_in_its_place_as_text(area: TabArea, images: list[Image.Image]) -> None:
    """Escaped, like what it says of itself."""
    *_, last = area._look(visitor(area, images), [], [], 0, None, "wrong")
    assert "&lt;wrong&gt;" in last[area.result]
    assert "<wrong>" not in last[area.result]


def test_nothing_is_looked_at_before_a_question(area: TabArea) -> None:
    """It says so; there is nothing to download either."""
    request = SimpleNamespace(session_hash="new")
    *_, last = area._look(request, [], [], 0, None, "a")
    assert "ask a question first" in last[area.status]
    assert "press Look first" in area._save(request)[1]


def test_the_download_is_of_what_was_chosen_then(area: TabArea, images: list[Image.Image]) -> None:
    """Of the tokens that were chosen when it was looked at; another visitor has nothing of it."""
    request = visitor(area, images)
    for _ in area._look(request, [1], [], 0, None, "a"):
        pass
    told = json.loads(area._save(request)[0])
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(told["body"]))) as packed:
        program = packed.read("reproduce-told.py").decode()
    assert "tokens = (1,)" in program
    assert not area._save(visitor(area, images, "b"))[0]
