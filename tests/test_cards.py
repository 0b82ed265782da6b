"""Cards as HTML, Markdown, TensorBoard and JSON: complete, self-contained, and unharmed by hostile text."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams import plugin_data_pb2

from concept_dict.cards import (
    CardSample,
    ConceptCard,
    End,
    Report,
    card_markdown,
    write_html,
    write_json,
    write_tensorboard,
)
from concept_dict.grounding import Word

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "a | b || c",
    "one\ntwo\r\nthree\rfour",
    "&lt;b&gt; & &amp;",
    "*b* _i_ `c` [l](http://example.org) ![i](http://example.org/x.png)",
    "# title",
    "{{ 7 * 7 }} {% raw %}",
    "back \\ slash \\| \\<",
    "</style></section>",
)


def _card(index: int = 3, text: str = "red", fact: str | None = "colour=red") -> ConceptCard:
    """A card with the same text as word, fact and caption."""
    samples = [CardSample(Image.new("RGB", (12, 8), colour), text, 2.5 - n) for n, colour in enumerate(("red", "blue"))]
    scores = (None, None) if fact is None else (0.987, 0.512)
    end = End([Word(text, 0.75), Word("blue", 0.125)], samples, fact, *scores)
    return ConceptCard(index, end, np.array([0.0, 0.0, 1.5, 2.5, 2.5]))


def _report(*cards: ConceptCard, text: str = "model") -> Report:
    return Report(f"Concepts of {text}", [(text, text)], list(cards))


class _Page(HTMLParser):
    """Tags with their attributes, and text per tag, as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.tags[-1][0] if self.tags else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _read(folder: Path) -> EventAccumulator:
    sizes = dict.fromkeys(("tensors", "images", "scalars", "histograms"), 0)
    events = EventAccumulator(str(folder), size_guidance=sizes)
    return events.Reload()


def _text(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(tag)[0].tensor_proto.string_val[0].decode()


def _rows(markdown: str) -> list[list[str]]:
    """The body rows of all tables, as TensorBoard shows them."""
    page = markdown_to_safe_html(markdown)
    bodies = "".join(re.findall(r"<tbody>(.*?)</tbody>", page, re.DOTALL))
    return [
        [" ".join(data for _, data in _Page(cell).text) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", bodies, re.DOTALL)
    ]


@pytest.mark.parametrize("text", ["red", *HOSTILE])
def test_the_page_needs_nothing_from_outside(text: str, tmp_path: Path) -> None:
    """All that a browser would load is in the file: pictures as data, no scripts, links only within the page."""
    page = write_html(_report(_card(text=text, fact=text), text=text), tmp_path / "report.html").read_text("utf-8")
    parsed = _Page(page)
    for _, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in parsed.tags}
    if text == "red":
        assert "http://" not in page
        assert "https://" not in page


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is_on_the_page(text: str, tmp_path: Path) -> None:
    """Words, facts, captions and titles are escaped: read back, the tags are those of a tame page, the text itself."""
    tame = _Page(write_html(_report(_card()), tmp_path / "tame.html").read_text("utf-8"))
    path = write_html(_report(_card(text=text, fact=text), text=text), tmp_path / "hostile.html")
    # As bytes, since reading as text would turn the line ends into one kind.
    hostile = _Page(path.read_bytes().decode("utf-8"))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in tame.tags]
    assert [image["alt"] for image in hostile.all("img")] == [text, text]
    shown = [data for tag, data in hostile.text if tag in ("dt", "dd", "span", "b", "title", "h1", "h2")]
    for expected in (text, f"Concepts of {text}", f"concept 3: {text}, blue"):
        assert expected in shown


def test_the_page_shows_every_concept(tmp_path: Path) -> None:
    """One section per card, linked from the overview, with words, scores, pictures and a histogram."""
    path = tmp_path / "report.html"
    assert write_html(_report(_card(0), _card(7, fact=None)), path) == path
    page = _Page(path.read_text("utf-8"))
    assert [section["id"] for section in page.all("section")] == ["concept-0", "concept-7"]
    assert [link["href"] for link in page.all("a")] == ["#concept-0", "#concept-7"]
    texts = [data for _, data in page.text]
    assert sum("0.987" in data for data in texts) == 2
    assert texts.count("0.750") == 2
    pictures = [Image.open(io.BytesIO(base64.b64decode((i["src"] or "").split(",")[1]))) for i in page.all("img")]
    assert [picture.size for picture in pictures] == [(128, 85)] * 4
    assert [picture.convert("RGB").getpixel((60, 40)) for picture in pictures] == [(255, 0, 0), (0, 0, 255)] * 2
    # Three activations above zero, two of them in the last bin: its bar is full, the first one half.
    heights = [i["style"] for i in page.all("i")][:24]
    assert (heights[0], heights[-1]) == ("height: 50%", "height: 100%")
    assert set(heights[1:-1]) == {"height: 0%"}


def test_a_card_with_nothing_to_show(tmp_path: Path) -> None:
    """A dead concept without words, samples and activations is still a card everywhere."""
    card = ConceptCard(0, End([], []), np.zeros(5))
    assert card.title == "concept 0: (no whole word)"
    report = Report("empty", [], [card])
    assert "(no whole word)" in write_html(report, tmp_path / "report.html").read_text("utf-8")
    assert json.loads(write_json(report, tmp_path / "report.json").read_text())["concepts"][0]["words"] == []
    tags = _read(write_tensorboard(report, tmp_path / "board")).Tags()
    assert "activations/00" in tags["histograms"]
    assert tags["images"] == []


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_does_not_break_the_table(text: str) -> None:
    """As TensorBoard shows it, the table has one row per word, and each cell holds the word as it is."""
    rows = _rows(card_markdown(_card(text=text, fact=text)))
    assert [row[1] for row in rows] == ["0.750", "0.125"]
    assert " ".join(rows[0][0].split()) == " ".join(text.split())
    assert rows[1][0] == "blue"


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=30))
@example(text="a|b")
@example(text="\\|")
@example(text="`|`")
def test_any_text_makes_one_row(text: str) -> None:
    """Whatever a word is made of, each word is one row with two cells."""
    rows = _rows(card_markdown(_card(text=text)))
    assert [len(row) for row in rows] == [2, 2]
    assert [row[1] for row in rows] == ["0.750", "0.125"]


def test_markdown_has_words_score_and_captions() -> None:
    """The card's text: title, score with its baseline, and the samples in order with their activations."""
    lines = card_markdown(_card(text="red")).splitlines()
    assert lines[0] == "### concept 3: red, blue"
    assert "Best fact **colour=red**, held-out AUROC **0.987** (shuffled labels 0.512)" in lines
    assert lines[-2:] == ["1. (2.50) red", "2. (1.50) red"]
    assert "AUROC" not in card_markdown(_card(fact=None))


@pytest.mark.parametrize("text", ["red", *HOSTILE])
def test_tensorboard_has_text_and_images_per_concept(text: str, tmp_path: Path) -> None:
    """Read back from the event files: per concept a text, a sheet of pictures and a histogram; scores as scalars."""
    cards = (_card(0, text), _card(12, text, fact=text))
    folder = write_tensorboard(_report(*cards, text=text), tmp_path / "board")
    events = _read(folder)
    tags = events.Tags()
    texts = [tag for tag in tags["tensors"] if tag.startswith("concepts/")]
    for index, card in ((0, cards[0]), (12, cards[1])):
        (tag,) = [tag for tag in texts if tag.startswith(f"concepts/{index:02d} ")]
        assert _text(events, tag) == card_markdown(card)
        (image,) = [tag for tag in tags["images"] if tag.startswith(f"concepts/{index:02d} ")]
        sheet = Image.open(io.BytesIO(events.Images(image)[0].encoded_image_string)).convert("RGB")
        # The samples side by side, in order.
        assert [sheet.getpixel((x, 70)) for x in (70, 204)] == [(255, 0, 0), (0, 0, 255)]
        values = events.Histograms(f"activations/{index:02d}")[0].histogram_value
        assert (values.num, values.max, values.sum) == (5, 2.5, 6.5)
    assert len(texts) == len(tags["images"]) == 2
    scores = {name: events.Scalars(f"AUROC by concept/{name}") for name in ("held out", "shuffled labels")}
    assert [score.step for score in scores["held out"]] == [0, 12]
    assert scores["held out"][1].value == pytest.approx(0.987)
    assert scores["shuffled labels"][1].value == pytest.approx(0.512)
    rows = _rows(_text(events, "overview/text_summary"))
    assert [(row[0], *row[3:]) for row in rows] == [("0", "0.987", "0.512"), ("12", "0.987", "0.512")]


def test_without_truth_there_are_no_scores(tmp_path: Path) -> None:
    """Concepts that no fact is known for have text and pictures, and no scalars."""
    tags = _read(write_tensorboard(_report(_card(fact=None)), tmp_path)).Tags()
    assert tags["scalars"] == []
    assert len(tags["images"]) == 1


@pytest.mark.parametrize("text", ["red", "Ü 日本", *HOSTILE])
def test_json_round_trip(text: str, tmp_path: Path) -> None:
    """Strict JSON in UTF-8 that gives back every text and number, without the pictures."""
    path = write_json(_report(_card(3, text, text), _card(4, fact=None), text=text), tmp_path / "report.json")

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    assert (content["title"], content["facts"]) == (f"Concepts of {text}", {text: text})
    first, second = content["concepts"]
    assert first == {
        "concept": 3,
        "words": [{"text": text, "probability": 0.75}, {"text": "blue", "probability": 0.125}],
        "fact": text,
        "held_out_auroc": 0.987,
        "shuffled_auroc": 0.512,
        "samples": [{"text": text, "activation": 2.5}, {"text": text, "activation": 1.5}],
    }
    assert (second["fact"], second["held_out_auroc"], second["shuffled_auroc"]) == (None, None, None)
    assert (content["settings"], content["metrics"]) == ({}, {})


def _both_ends() -> ConceptCard:
    """A signed concept with a map beside each picture, and a fact at either end."""
    card = _card()
    red, blue = (CardSample(Image.new("RGB", (8, 8), c), c, a) for c, a in (("red", 2.0), ("blue", -3.0)))
    green = Image.new("RGB", (8, 8), "lime")
    return replace(
        card,
        end=replace(card.end, samples=[replace(red, where=green)]),
        other=End([Word("azure", 0.5)], [replace(blue, where=green)], "colour=blue", 0.875, 0.5),
    )


def test_both_ends_of_a_signed_concept(tmp_path: Path) -> None:
    """Words and samples of either end, by name, on the page, in Markdown, TensorBoard and JSON."""
    card = _both_ends()
    text = card_markdown(card)
    assert text.index("#### positive end") < text.index("1. (2.00) red") < text.index("#### negative end")
    assert [row[0] for row in _rows(text)] == ["red", "blue", "azure"]
    assert text.index("**0.987**") < text.index("#### negative end") < text.index("**colour=blue**") < len(text)
    assert "held-out AUROC **0.875** (shuffled labels 0.500)" in text
    assert "1. (-3.00) blue" in text
    page = _Page(write_html(_report(card), tmp_path / "report.html").read_text("utf-8"))
    assert [data for tag, data in page.text if tag == "h3"] == ["positive end", "negative end"]
    assert [data for tag, data in page.text if tag == "a"] == ["3 +", "3 \N{MINUS SIGN}"]
    assert [data for _, data in page.text if data in ("0.987", "0.875")] == ["0.987", "0.875"]
    assert [data for tag, data in page.text if tag == "b" and "=" in data] == ["colour=red", "colour=blue"]
    assert [image["alt"] for image in page.all("img")] == ["red", "red", "blue", "blue"]
    events = _read(write_tensorboard(_report(card), tmp_path / "board"))
    tags = events.Tags()
    scores = {tag: events.Scalars(tag)[0].value for tag in tags["scalars"] if "held out" in tag}
    assert scores == pytest.approx(
        {"AUROC by concept/held out, positive end": 0.987, "AUROC by concept/held out, negative end": 0.875}
    )
    assert [row[:2] for row in _rows(_text(events, "overview/text_summary"))] == [
        ["3 +", "red, blue"],
        ["3 \N{MINUS SIGN}", "azure"],
    ]
    assert [tag.rsplit(" ", 2)[1] for tag in tags["images"]] == ["positive", "negative"]
    (written,) = json.loads(write_json(_report(card), tmp_path / "report.json").read_text())["concepts"]
    ends = [(end["fact"], end["held_out_auroc"]) for end in (written, written["negative_end"])]
    assert ends == [("colour=red", 0.987), ("colour=blue", 0.875)]
    assert written["negative_end"]["words"] == [{"text": "azure", "probability": 0.5}]
    assert written["negative_end"]["samples"] == [{"text": "blue", "activation": -3.0}]


def test_the_map_stands_beside_the_picture(tmp_path: Path) -> None:
    """On the sheet each picture is followed by the concept in it."""
    events = _read(write_tensorboard(_report(_both_ends()), tmp_path))
    for tag, colour in zip(events.Tags()["images"], ((255, 0, 0), (0, 0, 255)), strict=True):
        sheet = Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)).convert("RGB")
        assert [sheet.getpixel((x, 70)) for x in (70, 204, 338)] == [colour, (0, 255, 0), (255, 255, 255)]


def test_samples_without_pictures(tmp_path: Path) -> None:
    """Captions and activations are shown all the same."""
    card = ConceptCard(3, End([Word("red", 0.75)], [CardSample(None, "a caption", 1.5)]), np.zeros(5))
    page = write_html(_report(card), tmp_path / "report.html").read_text("utf-8")
    assert "a caption" in page
    assert "<img" not in page
    assert _read(write_tensorboard(_report(card), tmp_path / "board")).Tags()["images"] == []


def test_runs_compare_by_settings(tmp_path: Path) -> None:
    """Metrics are scalars; the plugin of hyperparameters finds settings and metrics in the run's one file."""
    settings = {"method": "SemiNMF", "k": 4, "center": True}
    report = replace(_report(_card()), metrics={"overlap": 0.25}, settings=settings)
    folder = write_tensorboard(report, tmp_path)
    assert len(list(folder.rglob("events.*"))) == 1
    events = _read(folder)
    assert events.Scalars("metrics/overlap")[0].value == 0.25
    found = events.summary_metadata
    started = plugin_data_pb2.HParamsPluginData.FromString(found["_hparams_/session_start_info"].plugin_data.content)
    told = started.session_start_info.hparams
    assert (told["method"].string_value, told["k"].number_value) == ("SemiNMF", 4)
    experiment = plugin_data_pb2.HParamsPluginData.FromString(found["_hparams_/experiment"].plugin_data.content)
    assert [info.name.tag for info in experiment.experiment.metric_infos] == ["metrics/overlap"]
    assert "| overlap | 0.25 |" in _text(events, "overview/text_summary")
    assert "<span>overlap</span> <b>0.25</b>" in write_html(report, tmp_path / "r.html").read_text("utf-8")


def test_the_projector_has_words_facts_and_pictures(tmp_path: Path) -> None:
    """One point per card, named by its first word, with all words, its fact, and its pictures' mean."""
    report = replace(_report(_card(0), _card(7, "green\tgrass")), concepts=torch.eye(2))
    folder = write_tensorboard(report, tmp_path)
    (table,) = folder.rglob("metadata.tsv")
    assert [line.split("\t") for line in table.read_text().splitlines()] == [
        ["concept", "word", "words", "fact", "attribute"],
        ["0", "red", "red, blue", "colour=red", "colour"],
        ["7", "green grass", "green grass, blue", "colour=red", "colour"],
    ]
    assert len(list(folder.rglob("sprite.png"))) == 1
