"""What stands on the page: everything has an address of its own, is labelled, and is there for every model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import gradio
import pytest

from hooked_mm.explorer.conversation import ModelName
from hooked_mm.explorer.desk import Desk
from hooked_mm.explorer.page_layout import MODEL, NOTHING, PICTURE, Layout
from hooked_mm.explorer.tab import load_tabs
from hooked_mm.hooked import HookedMM

NAMES = [ModelName("small", "llava"), ModelName("id", "someone/other")]


@pytest.fixture(params=[1, 2])
def layout(request: pytest.FixtureRequest, llava: HookedMM) -> Iterator[tuple[Layout, dict]]:
    """Of one model, and of two; and all components."""
    names = NAMES[: request.param]
    desk = Desk(names, load_tabs())
    desk._loaded[names[0]] = llava
    with gradio.Blocks() as blocks:
        made = Layout(desk)
    yield made, blocks.blocks
    desk.close()


def test_addresses_are_unique(layout: tuple[Layout, dict]) -> None:
    """Tests and other programs find each component by its address."""
    _, blocks = layout
    found = Counter(block.elem_id for block in blocks.values() if getattr(block, "elem_id", None))
    assert len(found) > 60
    assert not [name for name, count in found.items() if count > 1]


def test_another_model_is_offered_where_there_is_one(layout: tuple[Layout, dict]) -> None:
    """With one there is nothing to choose, and no second to compare with."""
    made, _ = layout
    several = len(made.model.choices) > 1
    assert made.model.interactive == several
    kinds = [value for _, value in made.compare.choices]
    assert kinds == [NOTHING, PICTURE] + [MODEL] * several


def test_only_the_first_side_shows_before_two_are_compared(layout: tuple[Layout, dict]) -> None:
    """Of patches and of tokens."""
    made, _ = layout
    assert [column.visible for column in made.columns] == [True, False, True, False]
    assert len(made.tokens) == len(made.patches) == 2


def test_every_control_of_every_tab_is_there(layout: tuple[Layout, dict], llava: HookedMM) -> None:
    """In the tabs' order, first values set; all of it is changed by an answer."""
    made, _ = layout
    assert [area.tab.name for area in made.areas] == [tab.name for tab in load_tabs()]
    for area in made.areas:
        wanted = {control.name: (control.label, control.value) for control in area.tab.controls(llava)}
        assert {name: (one.label, one.value) for name, one in area.controls.items()} == wanted
        assert set(area.components) <= set(made.components)
