"""What reports share: escaped pages that say what is missing, and Markdown that shows text as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError
from PIL import Image

from concept_dict.cards import Report
from concept_dict.grounding import Word
from concept_dict.page import _address, markdown_table, markdown_text, markdown_words, write_page
from hooked_mm.drawing import data_uri


def test_pages_are_escaped_and_complete(tmp_path: Path) -> None:
    """Text is no HTML; what a template needs and is not given is an error, not a gap."""
    page = write_page("base.html", tmp_path / "page.html", report=Report("<b>&", [("a", "<i>")], []))
    assert "<title>&lt;b&gt;&amp;</title>" in page.read_text("utf-8")
    assert "<dd>&lt;i&gt;</dd>" in page.read_text("utf-8")
    with pytest.raises(UndefinedError):
        write_page("base.html", tmp_path / "page.html")


def test_pictures_are_small_unless_asked_for() -> None:
    """The longer side has 128 pixels, or what it has."""
    image = Image.new("RGB", (256, 64), "red")
    assert _address(image) == data_uri(image.resize((128, 32), Image.Resampling.LANCZOS))
    assert _address(image, None) == data_uri(image)


def test_markdown() -> None:
    """Cells in rows; marks, bars and lines are no Markdown; words in bold where they are marked."""
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert markdown_text("a|*b*\n<c>") == "a&#124;\\*b\\* &lt;c&gt;"
    rows = markdown_words([Word("red", 0.5), Word("b_e", 0.25)], {"b_e"}).splitlines()
    assert rows[2:] == ["| red | 0.500 |", "| **b\\_e** | 0.250 |"]
