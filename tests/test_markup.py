"""Panels, conversations and patches as HTML: text stays text, colours are legible, places are right, clicks arrive."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.explorer import markup
from hooked_mm.explorer.asked import Patches
from hooked_mm.explorer.conversation import Conversation
from hooked_mm.explorer.panels import Facts, Heat, Note, Panel, Picture, Pictures, Table, Texts, Words
from tests.browser import chromium

EVIL = "<img src=x onerror='window.bad=1'>\"'</p></span>**b** ${window.bad=1} {{7*7}} {% raw %} <script>bad=1</script>"


class Read(HTMLParser):
    """What a browser finds in HTML: its tags, its text, its attributes, what can be clicked."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.picks: list[Any] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(sorted(name for name, _ in attrs))))
        self.values += [(name, value or "") for name, value in attrs]
        if tag == "button":
            self.picks.append(json.loads(dict(attrs)["data-pick"] or ""))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def picture(width: int = 6, height: int = 4, colour: str = "teal") -> Image.Image:
    """A picture in one colour."""
    return Image.new("RGB", (width, height), colour)


def everything(text: str) -> str:
    """Every panel, a conversation and two sides, with a text wherever one can stand."""
    panels: list[Panel] = [
        Note(text, "warning"),
        Facts([(text, text)]),
        Pictures([Picture(text, picture(), {text: text}), Picture(text, picture())], text),
        Table([text, "n"], [[text, 1], [text, 2]], text, [{text: text}, None]),
        Heat(torch.ones(1, 1), [text], [text], text, text, ("layer", None), row_values=[text], texts=[[text]]),
        Heat(torch.ones(1, 1), [text], [text], text),
        Words([(text, 0.5), (text, -0.5)], text, [{text: text}, None]),
        Texts([(text, text)]),
    ]
    talk = Conversation().say(text, (picture(),)).answered(text).say(text)
    return markup.sides_html([(text, markup.panels_html(panels)), (text, markup.conversation_html(talk, text, text))])


@given(st.text(st.sampled_from("<>&'\"`=/\\;{}%#$!- \n\tabix1éß语🙂\u2028\u202e\x1b"), min_size=1, max_size=40))
def test_text_is_text_wherever_it_stands(text: str) -> None:
    """Whatever a model or a person wrote makes no tag and no attribute, and is found again in what can be clicked."""
    plain, read = Read(everything("word")), Read(everything(text))
    assert read.tags == plain.tags
    assert len(read.picks) == len(plain.picks) == 4
    assert [pick for pick in read.picks if "layer" not in pick] == [{text: text}] * 3
    assert {"layer": text} in read.picks


def test_html_from_a_model_is_read_as_it_was_written() -> None:
    """The notorious ones, character by character, in every place where text is shown."""
    read = Read(everything(EVIL))
    whole = "".join(read.text)
    assert whole.count(EVIL) == "".join(Read(everything("§")).text).count("§")
    assert not {"script", "iframe", "a"} & {tag for tag, _ in read.tags}
    assert not [name for name, _ in read.values if name.startswith("on")]
    # The half of a character can't be sent to a browser.
    assert "\\ud800" in markup.panels_html([Note("\ud800")])


def test_numbers_are_shown_with_four_digits() -> None:
    """Whole numbers as they are, truth as a word, what is missing as a dash."""
    values = [0.123456, 12345678, True, None, float("nan"), torch.tensor(0.25), -1e-9, "0.123456"]
    assert [markup.shown(value) for value in values] == [
        "0.1235",
        "12345678",
        "yes",
        "–",
        "–",
        "0.25",
        "-1e-09",
        "0.123456",
    ]
    html = markup.panels_html([Table(["a", "b", "c"], [["x", 1.0, True], ["y", None, False]])])
    assert [kind.count("hm-number") for kind in re.findall(r"<th .*?>", html)] == [0, 1, 0]


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Of two colours, as WCAG 2 defines it."""
    found = []
    for colour in (first, second):
        linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
        found.append(sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05)
    return max(found) / min(found)


def test_text_on_every_colour_can_be_read() -> None:
    """In the style sheet as the browser gets it: contrast of at least 4.5, and steps that differ."""
    rules = re.findall(r"^(\.dark )?\.hm \.hm-([np])(\d+)\{background:rgb\((.*?)\);color:(#\w+)\}", markup.CSS, re.M)
    assert len(rules) == 2 * 2 * markup.LEVELS
    colours = {}
    for dark, sign, level, background, text in rules:
        colour = tuple(map(int, background.split(",")))
        assert contrast(colour, (0, 0, 0) if text == "#000" else (255, 255, 255)) >= 4.5
        colours[dark, sign, int(level)] = colour
    for dark in ("", ".dark "):
        for sign in "np":
            ramp = [contrast(colours[dark, sign, level], (255, 255, 255)) for level in range(1, markup.LEVELS + 1)]
            # Strength shows without colour too: darker and darker on white, brighter and brighter on black.
            assert all((after > before) is not bool(dark) for before, after in pairwise(ramp))


def test_a_cell_has_the_colour_of_its_value() -> None:
    """From nothing at zero to the last step at the peak; unknown ones have none."""
    values = torch.tensor([[0.0, 0.5, 1.0], [-1.0, float("nan"), -0.01]])
    html = markup.panels_html([Heat(values, ["0", "1"], ["a", "b", "c"], corner="layer \\ token")])
    assert re.findall(r'<td class="(hm-\w+)" title="(.*?)"', html) == [
        ("hm-p0", "layer 0, token a: 0"),
        ("hm-p10", "layer 0, token b: 0.5"),
        ("hm-p20", "layer 0, token c: 1"),
        ("hm-n20", "layer 1, token a: -1"),
        ("hm-none", "layer 1, token b: –"),
        ("hm-p0", "layer 1, token c: -0.01"),
    ]
    doubled = markup.panels_html([Heat(values, ["0", "1"], ["a", "b", "c"], peak=2)])
    assert re.findall(r'<td class="(hm-\w+)"', doubled)[:4] == ["hm-p0", "hm-p5", "hm-p10", "hm-n10"]
    assert "hm-p0" in markup.panels_html([Heat(torch.zeros(1, 1), ["0"], ["0"])])


def test_a_cell_gives_its_row_and_column_to_controls() -> None:
    """By number unless values are given; a control alone where there is only one."""
    heat = Heat(torch.rand(2, 2), ["0", "1"], ["0", "1"], picks=("layer", "head"), row_values=[5, 7])
    assert Read(markup.panels_html([heat])).picks == [
        {"layer": layer, "head": head} for layer in (5, 7) for head in (0, 1)
    ]
    heat = Heat(torch.rand(1, 2), ["0"], ["0", "1"], picks=(None, "head"))
    assert Read(markup.panels_html([heat])).picks == [{"head": 0}, {"head": 1}]
    # Tab reaches one cell only; the arrow keys the others.
    assert markup.panels_html([heat]).count('tabindex="-1"') == 1


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (40, 100)])
def test_a_large_table_of_colours_stays_light(rows: int, columns: int) -> None:
    """Every cell is there, in less than a megabyte."""
    heat = Heat(
        torch.randn(rows, columns),
        [f"layer {n}" for n in range(rows)],
        list(map(str, range(columns))),
        picks=("a", "b"),
    )
    html = markup.panels_html([heat])
    assert len(Read(html).picks) == rows * columns
    assert len(html) < 1_000_000


def test_more_cells_than_can_be_shown_are_left_out_and_said() -> None:
    """Rows below; the colours are those of the whole."""
    values = torch.ones(markup.MOST_CELLS // 100 + 7, 100)
    values[-1] = 2
    html = markup.panels_html([Heat(values, list(map(str, range(len(values)))), list(map(str, range(100))))])
    assert "7 more rows are not shown." in html
    assert html.count('<td class="hm-p10"') == markup.MOST_CELLS


def test_pictures_are_bounded_and_keep_their_shape() -> None:
    """A photograph is no heavier than what is shown of it; small pictures are enlarged with hard edges."""
    noise = Image.effect_noise((2000, 1500), 80).convert("RGB")
    html = markup.panels_html([Pictures([Picture("large", noise), Picture("small", picture(48, 72))])])
    assert len(html) < 150_000
    values = Read(html).values
    assert [value for name, value in values if name in ("width", "height")] == ["176", "132", "117", "176"]
    assert html.count("hm-crisp") == 1
    assert ("alt", "large") in values


def test_the_conversation_shows_who_said_what() -> None:
    """Turns in their order, a cursor while an answer is made, nothing where there is none."""
    talk = Conversation().say("one ?", (picture(),)).answered("1").say("two ?")
    who = [
        text for text in Read(markup.conversation_html(talk)).text if text in ("you", "model", "one ?", "1", "two ?")
    ]
    assert who == ["you", "one ?", "model", "1", "you", "two ?"]
    assert "hm-cursor" not in markup.conversation_html(talk)
    assert Read(markup.conversation_html(talk, "tw")).text.count("tw") == 1
    assert "hm-cursor" in markup.conversation_html(talk, "")
    assert "(no word)" in markup.conversation_html(talk.answered(""))
    assert "hm-turn " not in markup.conversation_html(Conversation())
    assert markup.sides_html([("alone", "<b>x</b>")]).count("alone") == 0


def test_a_thumbnail_is_never_another_pictures() -> None:
    """Where a picture has gone, its number in memory may be the next visitor's; nothing is kept of it."""
    seen, before = {}, set(markup._URIS._kept)
    for step in range(40):
        image = picture(8, 8, f"rgb({step},0,0)")
        html = markup.conversation_html(Conversation().say("?", (image,)))
        assert html == markup.conversation_html(Conversation().say("?", (image,)))
        seen[html] = step
        del image
    assert len(seen) == 40
    gc.collect()
    assert set(markup._URIS._kept) <= before


def test_patches_are_named_and_marked() -> None:
    """One button each; those that were chosen are pressed; a picture without places is shown with a word about it."""
    html = markup.patches_html(
        [(picture(), Patches(2, 3, (0, 0, 6, 4))), (picture(), None), (picture(), Patches(1, 1, (0, 0, 6, 4)))],
        [(0, 1, 2), (1, 0, 0)],
    )
    read = Read(html)
    assert read.picks == [
        *({"picture": 0, "row": row, "col": col} for row in range(2) for col in range(3)),
        {"picture": 2, "row": 0, "col": 0},
    ]
    pressed = [value == "true" for name, value in read.values if name == "aria-pressed"]
    assert pressed == [False] * 5 + [True] + [False]
    assert ("aria-label", "picture 1, row 2, column 3") in read.values
    assert "does not tell patches of picture 2 apart" in html
    assert len(markup.patches_html([(picture(), Patches(54, 54, (0, 0, 6, 4)))], [])) < 600_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for this file."""
    with chromium() as running:
        yield running


def page_of(browser: Any, html: str) -> Any:
    """A page with the style sheet, and the script run as Gradio runs it; what it triggers is kept."""
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    page.set_content(f"<style>{markup.CSS}</style><div id=root>{html}</div>")
    page.evaluate(
        "js => { window.told = []; Function('element', 'trigger', js)("
        "document.getElementById('root'), (name, data) => window.told.push([name, data])) }",
        markup.CLICK_JS,
    )
    return page


def test_a_patch_lies_where_the_grid_says(browser: Any) -> None:
    """In the browser: the middle of a button is the middle of its patch, in pixels of the picture."""
    boxes = [(0, 0, 90, 60), (-5, -20, 95, 80), (10, 5, 70, 65), (3, 0, 87, 60)]
    grids = [Patches(5, 7, (float(left), float(top), float(right), float(low))) for left, top, right, low in boxes]
    page = page_of(browser, markup.patches_html([(picture(90, 60), patches) for patches in grids], []))
    for number, patches in enumerate(grids):
        image = page.locator("img").nth(number).bounding_box()
        for row, col in ((0, 0), (4, 6), (2, 3)):
            name = f"picture {number + 1}, row {row + 1}, column {col + 1}"
            cell = page.locator(f'[aria-label="{name}"]').bounding_box()
            x = (cell["x"] + cell["width"] / 2 - image["x"]) / image["width"] * 90
            y = (cell["y"] + cell["height"] / 2 - image["y"]) / image["height"] * 60
            assert (x, y) == pytest.approx(patches.centre(row, col), abs=0.3)
    page.close()


def test_clicks_and_keys_arrive(browser: Any) -> None:
    """A cell, a row of a table, a patch; Enter and Space; the arrow keys lead from cell to cell and not around."""
    heat = Heat(torch.rand(2, 3), ["0", "1"], ["0", "1", "2"], picks=("layer", "head"))
    table = Table(["concept", "n"], [[EVIL, 1], ["two", 2]], picks=[{"concept": EVIL}, None])
    page = page_of(browser, markup.panels_html([heat, table, Note(EVIL)]))
    page.locator("button[title^='0, 1:']").click()
    for key in ("ArrowRight", "ArrowRight", "Enter", "ArrowDown", "Space", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.locator("tr.hm-click td").nth(1).click()
    page.get_by_text("two").click()
    assert page.evaluate("window.told") == [
        ["click", {"pick": pick}]
        for pick in (
            {"layer": 0, "head": 1},
            {"layer": 0, "head": 2},
            {"layer": 1, "head": 2},
            {"layer": 1, "head": 2},
            {"concept": EVIL},
        )
    ]
    assert page.evaluate("window.bad") is None
    page.close()


def test_the_newest_is_seen(browser: Any) -> None:
    """A long conversation stands at its end."""
    talk = Conversation()
    for number in range(30):
        talk = talk.say(f"question {number}").answered(f"answer {number}")
    page = page_of(browser, markup.conversation_html(talk, title="small:llava"))
    log, last = page.locator(".hm-log").bounding_box(), page.get_by_text("answer 29").bounding_box()
    assert log["y"] <= last["y"]
    assert last["y"] + last["height"] <= log["y"] + log["height"]
    page.close()
