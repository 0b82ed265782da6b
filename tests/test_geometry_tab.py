"""The geometry tab: what stands in its table and on its map; its Python; what it says of few positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from analyses import geometry_tab
from analyses.geometry_tab import POINTS, make_tab
from analyses.position_geometry import PositionRows
from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Facts, Note, Pictures, Table
from hooked_mm.explorer.tab import Choice, View
from hooked_mm.explorer.work import Stopped, Work
from hooked_mm.hooked import HookedMM
from tests.explored import ask, assert_same, first_values, look, made_again, told
from tests.processors import processor
from tests.tiny import picture as any_picture
from tests.tiny import tiny

TAB = make_tab([])


def of(view: View, kind: type[Any]) -> list[Any]:
    """Its panels of one kind."""
    return [panel for panel in view.panels if isinstance(panel, kind)]


@pytest.fixture(scope="module")
def asked(llava: HookedMM, images: list[Image.Image]) -> Asked:
    """An answer of several words."""
    return ask(llava, "describe the scene in short .", images[0])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are not drawn where only numbers and words are looked at."""
    for name in ("curves_figure", "map_figure"):
        monkeypatch.setattr(geometry_tab, name, lambda *_: None)
    monkeypatch.setattr(geometry_tab, "as_picture", lambda _: Image.new("RGB", (8, 8)))


@pytest.mark.usefixtures("undrawn")
def test_the_table_is_of_transformers_hidden_states(asked: Asked) -> None:
    """Norms and the cosine of means by hand; a click maps the layer."""
    with torch.no_grad():
        states = asked.model.hf_model(**asked.batch.inputs, output_hidden_states=True).hidden_states[:-1]
    image = asked.batch.mask(modality="image")[0]
    (table,) = of(look(TAB, asked), Table)
    assert table.columns == ("layer", "all", "text", "image")
    for layer, state in enumerate(states):
        norms = state[0].norm(dim=-1)
        expected = [norms.mean(), norms[~image].mean(), norms[image].mean()]
        assert table.rows[layer][1:] == pytest.approx([float(value) for value in expected], rel=1e-4)
    assert list(table.picks) == [{"layer": n} for n in range(7)]
    (means,) = of(look(TAB, asked, measure="means"), Table)
    for layer, state in enumerate(states):
        cosine = torch.cosine_similarity(state[0, image].mean(0), state[0, ~image].mean(0), dim=0)
        assert means.rows[layer][1] == pytest.approx(float(cosine), abs=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_the_number_of_rows_is_told_and_what_it_does_not_allow(asked: Asked) -> None:
    """No dimension of a dozen words; no adjusted score of fewer positions than dimensions."""
    view = look(TAB, asked, measure="dimension")
    text = int((~asked.batch.mask(modality="image")).sum())
    assert dict(of(view, Facts)[0].facts)["text positions"] == text < 50
    assert f"needs 50 positions; there are {text} of text" in of(view, Note)[0].text
    assert all(row[2] == "" for row in of(view, Table)[0].rows)
    assert "64 positions of image for 128 dimensions" in of(look(TAB, asked, measure="linearity"), Note)[0].text


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_the_python_finds_the_same_again(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    """Measures, points, maps of parts, directions alone; pictures of a bounded size."""
    asked = ask(small(name), "what colour is the star ?", images[1], name=name)
    changes: list[dict[str, Any]] = (
        [{"measure": measure} for measure in ("means", "linearity")] if name == "llava" else []
    )
    changes += [{"point": "attn_out", "layer": 1, "on_map": "text", "unit": True, "ordinary": True}]
    for changed in changes:
        view = look(TAB, asked, **changed)
        assert_same(made_again(view, asked), view.arrays)
    (drawn,) = of(view, Pictures)
    assert len(drawn.pictures) == 2
    assert all(max(one.image.size) <= 600 for one in drawn.pictures)
    assert len(view.arrays["map"]) == int(asked.batch.mask(modality="text").sum())


def test_a_layer_that_the_point_has_not(asked: Asked) -> None:
    """What attention adds has no layer 0; it is refused, as another would not be what was asked."""
    with pytest.raises(BadInputError, match="layer '0'"):
        look(TAB, asked, point="attn_out", layer=0)


@pytest.mark.usefixtures("undrawn")
def test_without_a_picture(llava: HookedMM) -> None:
    """Text alone, and no cosine with images."""
    asked = ask(llava, "what colour is the star ?")
    view = look(TAB, asked, measure="means")
    assert "no image positions" in of(view, Note)[0].text
    assert of(look(TAB, asked), Table)[0].rows[0][3] == ""


@pytest.mark.usefixtures("undrawn")
def test_a_sink_is_named(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its word and size, unless it is left out; then the map goes without it."""
    real = geometry_tab.position_rows

    def with_sink(*given: Any) -> PositionRows:
        rows = real(*given)
        values = rows.values.clone()
        values[3, 0] *= 1000
        return replace(rows, values=values)

    monkeypatch.setattr(geometry_tab, "position_rows", with_sink)
    (note,) = of(look(TAB, asked), Note)
    assert note.kind == "warning"
    assert note.text.startswith("Of massive norm: position 0 ('")
    view = look(TAB, asked, ordinary=True)
    assert not of(view, Note)
    assert 0 not in view.arrays["map_positions"].tolist()
    assert dict(of(view, Facts)[0].facts)["left out as massive"] == 1


def test_points_are_those_that_the_model_has(llava: HookedMM) -> None:
    """All of them in the small LLaVA; the stream in every model."""
    (choice,) = [one for one in TAB.controls(llava) if isinstance(one, Choice) and one.name == "point"]
    assert [value for _, value in choice.options] == list(POINTS)


def test_it_can_be_stopped_between_layers(asked: Asked) -> None:
    """A wide model's least squares take long."""

    class Stopping(Work):
        def step(self, told: str, done: int | None = None, total: int | None = None) -> None:
            if done == 1:
                self.stop()
            super().step(told, done, total)

    with pytest.raises(Stopped):
        TAB.look(asked, first_values(TAB, asked.model, measure="linearity"), Stopping())


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("family", ["mllama", "florence2"])
def test_text_alone_where_pictures_stand_elsewhere(family: str) -> None:
    """The decoder's positions hold no picture, which is said."""
    model = HookedMM(tiny(family), processor(family), check=False)
    asked = told(model, "what is this ?", "the red circle", any_picture(40, 30), name=family)
    view = look(TAB, asked)
    assert of(view, Note)[0].text == "There are no image positions."
    assert len(view.arrays["map"]) == asked.answer_batch.modality.shape[1]
    assert_same(made_again(view, asked), view.arrays)
