"""Galleries: everything given is there, as text; pages are bounded; nothing runs in a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from analyses.gallery import ENTRIES, PICTURES, Entry, in_pages, write_gallery
from hooked_mm.errors import BadInputError
from tests.browser import chromium, opened
from tests.lens_samples import EVIL


class _Read(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep it."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Keep it."""
        self.words.append(data)


def _picture(size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert("RGB")


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1) | st.sampled_from(EVIL), max_size=4)
)
def test_text_stays_text_wherever_it_stands(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    """Titles, facts, captions, paragraphs and notes make no tag and no attribute, and can be read as they were."""
    path = tmp_path_factory.mktemp("gallery") / "page.html"
    entries = [Entry(text, [(text, text)], [(text, _picture())], text) for text in texts]
    read = _Read(write_gallery(path, "".join(texts), entries, texts).read_text(encoding="utf-8"))
    known = {"html", "head", "meta", "title", "style", "body", "h1", "ul", "li", "section", "h2", "p", "dl", "dt", "dd"}
    assert {tag for tag, _ in read.tags} <= known | {"div", "figure", "img", "figcaption"}
    images = [attributes for tag, attributes in read.tags if tag == "img"]
    assert [image["alt"] for image in images] == texts
    for text in texts:
        assert read.words.count(text) >= 6
    for _, attributes in read.tags:
        assert set(attributes) <= {
            "lang",
            "charset",
            "name",
            "content",
            "http-equiv",
            "class",
            "style",
            "src",
            "alt",
            "loading",
        }


def test_a_page_needs_nothing_else_and_forbids_it(tmp_path: Path) -> None:
    """Pictures are in the file, small ones unharmed, large ones made smaller; the policy lets no script in."""
    entry = Entry("one", [("share", 0.123456), ("count", 3)], [("a", _picture()), ("b", _picture((3000, 1500)))])
    text = write_gallery(tmp_path / "page.html", "title", [entry], side=300).read_text()
    read = _Read(text)
    sources = [attributes["src"] or "" for tag, attributes in read.tags if tag == "img"]
    assert [source.split(",")[0] for source in sources] == ["data:image/png;base64", "data:image/jpeg;base64"]
    policy = next(attributes["content"] for _, attributes in read.tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not re.findall(r"https?://|<script|<link|url\(", text)
    assert len(text) < 60_000
    assert {"0.1235", "3"} <= set(read.words)
    with pytest.raises(BadInputError, match=r"let its name end in \.html"):
        write_gallery(tmp_path / "page", "title", [])
    # Half a character can't be written; its name can.
    assert "\\ud800" in write_gallery(tmp_path / "half.html", "a\ud800", []).read_text()


@given(st.lists(st.integers(0, 12), max_size=30), st.integers(1, 5), st.integers(1, 6))
def test_pages_are_bounded_and_lose_nothing(counts: list[int], most: int, pictures: int) -> None:
    """All pictures in their order; no page has more than it may."""
    small = _picture()
    entries = [Entry(str(number), (), [(f"{number}.{n}", small) for n in range(c)]) for number, c in enumerate(counts)]
    pages = in_pages(entries, most, pictures)
    assert all(len(page) <= most and sum(len(e.pictures) for e in page) <= pictures for page in pages)
    shown = [caption for page in pages for entry in page for caption, _ in entry.pictures]
    assert shown == [caption for entry in entries for caption, _ in entry.pictures]
    titles = [entry.title.split(" (")[0] for page in pages for entry in page]
    assert list(dict.fromkeys(titles)) == [entry.title for entry in entries]


def test_a_long_gallery_is_several_pages_that_lead_to_each_other(tmp_path: Path) -> None:
    """Every page is reached from every other."""
    entries = [Entry(f"sample {number}") for number in range(2 * ENTRIES + 1)]
    write_gallery(tmp_path / "all.html", "title", entries)
    names = ["all.html", "all-2.html", "all-3.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for name in names:
        links = {attributes["href"] for tag, attributes in _Read((tmp_path / name).read_text()).tags if tag == "a"}
        assert links == set(names) - {name}
    many = [Entry("many", (), [("x", _picture())] * (PICTURES + 1))]
    assert [entry.title for page in in_pages(many) for entry in page] == ["many (1 of 2)", "many (2 of 2)"]


@pytest.mark.slow
def test_in_a_browser_nothing_runs_and_nothing_is_asked_for(tmp_path: Path) -> None:
    """Tags are text; pictures have their size, or the page's width where that is less."""
    entries = [Entry(text, [(text, text)], [(text, _picture()), (text, _picture((900, 300)))], text) for text in EVIL]
    path = write_gallery(tmp_path / "page.html", EVIL[0], entries, [EVIL[1]])
    with chromium() as browser:
        page, wrong = opened(browser, path, width=700)
        assert page.title() == EVIL[0]
        assert page.evaluate("window.ran") is None
        assert page.locator("img").count() == 2 * len(EVIL)
        small, large = (page.locator("img").nth(n).bounding_box()["width"] for n in (0, 1))
        assert small == pytest.approx(22, abs=2)
        assert 500 < large < 660
        assert page.evaluate("document.documentElement.scrollWidth") <= 700
        assert not wrong
        page.close()
