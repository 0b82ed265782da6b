"""The page about the explorer is true: what its table names exists, its tab runs."""

from __future__ import annotations

import re

import gradio
import pytest
from PIL import Image

from hooked_mm.explorer.conversation import ModelName
from hooked_mm.explorer.desk import Desk
from hooked_mm.explorer.panels import Note
from hooked_mm.explorer.tab import load_tabs
from hooked_mm.explorer.web_page import Page
from hooked_mm.hooked import HookedMM
from tests.explored import ask, assert_same, look, made_again
from tests.pages import DOCS, broken_links

TEXT = (DOCS / "explorer.md").read_text()
TABLE = TEXT[TEXT.index("## Beside LVLM-Interpret") : TEXT.index("## What is downloaded")]


@pytest.fixture(scope="module")
def asked(llava: HookedMM, images: list[Image.Image]):
    """A question with a patch chosen."""
    return ask(llava, "describe the image .", images[0], points=[(0, 20.0, 20.0)])


def test_every_control_of_the_table_exists(llava: HookedMM) -> None:
    """By the titles and labels that a visitor reads."""
    tabs = load_tabs()
    there = {(tab.title, control.label) for tab in tabs for control in tab.controls(llava)}
    desk = Desk([ModelName("small", "llava")], [])
    desk._loaded[ModelName("small", "llava")] = llava
    page = Page(desk)
    there |= {
        ("page", block.label) for block in page.blocks.blocks.values() if isinstance(block, gradio.components.Component)
    }
    desk.close()
    named = [tuple(name.split(" · ")) for name in re.findall(r"`([^`]+ · [^`]+)`", TABLE)]
    assert len(named) >= 15
    assert not [name for name in named if name not in there]


def test_every_output_of_the_table_is_shown(asked) -> None:
    """As the title of a panel of that tab, at a first look."""
    named = [name.split(" → ") for name in re.findall(r"`([^`]+ → [^`]+)`", TABLE)]
    assert len(named) >= 9
    tabs = {tab.title: tab for tab in load_tabs()}
    for title in dict.fromkeys(title for title, _ in named):
        shown = [getattr(panel, "title", "") for panel in look(tabs[title], asked).panels]
        wanted = [wanted for own, wanted in named if own == title]
        assert not [one for one in wanted if not any(one in panel for panel in shown)], shown


def test_the_tabs_of_the_page_are_those_that_there_are() -> None:
    """In their order."""
    rows = re.findall(r"^\| ([\w -]+) \|", TEXT[TEXT.index("| tab |") :], re.MULTILINE)
    titles = [tab.title for tab in load_tabs()]
    assert rows[1 : 1 + len(titles)] == titles


def test_the_tab_of_the_page_works(asked) -> None:
    """As a reader would write it."""
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    exec(block, names)
    view = look(names["make_tab"]([]), asked)
    assert isinstance(view.panels[0], Note)
    assert len(view.panels[1].words) == view.arrays["norms"].shape[0]
    assert_same(made_again(view, asked), view.arrays)


def test_links_lead_somewhere() -> None:
    """Pages, pictures and modules."""
    assert not broken_links("explorer.md")
