"""The page's small texts: whatever is said in them is text."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.explorer.notices import about_html, error_html, progress_html, tray_html, view_html, visible
from hooked_mm.explorer.panels import Note
from hooked_mm.explorer.tab import View

EVIL = "</pre></span></p></div><script>x</script><img src=x onerror='y'>&amp;\"'"
OPEN = ["img", "progress"]


class Read(HTMLParser):
    """The elements of a text, and what a reader reads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Note it."""
        self.said += data


@given(st.one_of(st.just(EVIL), st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1)))
def test_what_is_said_is_read_as_it_was_written(said: str) -> None:
    """Of models, visitors and errors alike: the elements are ours, the words theirs, letter by letter."""
    picture = Image.new("RGB", (4, 4))
    for made, tags in (
        (about_html(said), ["p"]),
        (error_html(said), ["div"]),
        (progress_html(said, 0.5), ["div", "progress", "span"]),
        (tray_html([picture], said), ["div", "img"]),
        (view_html(View([], said, {"a": torch.zeros(1)})), None),
    ):
        read = Read(made)
        assert said in read.said
        assert tags is None or [tag for tag, _ in read.tags] == tags
        assert not any(tag == "script" or "onerror" in given for tag, given in read.tags)


@pytest.mark.parametrize(("share", "value"), [(0.25, "0.250"), (0.0, "0.000"), (1.5, "1.000"), (-1.0, "0.000")])
def test_a_bar_shows_how_much_is_done(share: float, value: str) -> None:
    """Never more than all and never less than nothing; without a share it only moves."""
    (bar,) = [given for tag, given in Read(progress_html("layers", share)).tags if tag == "progress"]
    assert bar == {"value": value}
    assert math.isfinite(float(value))
    assert ("progress", {}) in Read(progress_html("layers", None)).tags


def test_pictures_that_wait_are_small() -> None:
    """One element each, in their order, however large they are; nothing where none waits."""
    made = tray_html([Image.new("RGB", (4000, 3000), "red"), Image.new("RGB", (3, 5))])
    shown = [given for tag, given in Read(made).tags if tag == "img"]
    assert [one["alt"] for one in shown] == ["picture 1", "picture 2"]
    assert len(made) < 20_000
    assert tray_html([]) == ""


def test_the_python_of_a_view_is_behind_a_fold() -> None:
    """Only where there are numbers to find again."""
    assert "<details" in view_html(View([Note("a")], "arrays = {}", {"a": torch.zeros(1)}))
    assert "<details" not in view_html(View([Note("a")]))


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("star", "star"),
        (" star", " star"),
        ("\n", r"'\n'"),
        ("", "''"),
        (" ", "' '"),
        ("\u200b", r"'\u200b'"),
        ("é", "é"),
    ],
)
def test_a_token_can_be_seen(word: str, shown: str) -> None:
    """Also where it is space, nothing, or a letter that does not show."""
    assert visible(word) == shown
