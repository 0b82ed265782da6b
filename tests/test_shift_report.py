"""A shift's page and its run of TensorBoard: complete, self-contained, and unharmed by hostile text."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor

from concept_dict.grounding import Word
from concept_dict.pca import PCA
from concept_dict.recovery import CONTROLS, FORMS
from concept_dict.shift_cards import ShiftReport, build_report
from concept_dict.shift_report import card_markdown, overview_markdown, sheet, write_html, write_tensorboard
from concept_dict.shift_tables import comparison_rows, form_rows
from tests.shifts import SAMPLES, decode, made_up, told, with_enough
from tests.test_cards import HOSTILE, _Page, _read, _rows, _text

RED, BLUE = (Image.new("RGB", (12, 8), colour) for colour in ("red", "blue"))


def _report(text: str = "red", *, empty: bool = False, known: bool = True) -> ShiftReport:
    """Four concepts, one of them without a partner; the same text as title, fact, first word and caption."""

    def said(directions: Tensor) -> list[list[Word]]:
        return [[Word(text, 0.75), *words[1:]] for words in decode(directions)]

    study, measure = made_up(empty=empty)
    study = with_enough(study, 19)
    if known:
        fates = replace(study.fates, fate=["new", "kept", "kept", "specialised"], lost=[1])
        study = replace(study, recovery=told(study), fates=fates)
    return build_report(
        study,
        measure,
        decoders=(said, said),
        pictures=lambda number: [BLUE if number % 2 else RED],
        texts=([text] * SAMPLES, [f"{text} after"] * SAMPLES),
        title=f"Shift of {text}",
        facts=[(text, text)],
        hook="blocks.1",
        models=("one", "other"),
        count=2,
    )


@pytest.mark.parametrize("text", ["red", " ".join(HOSTILE)])
def test_the_page_needs_nothing_from_outside(text: str, tmp_path: Path) -> None:
    """Pictures and figures as data, no scripts, links within the page; hostile text is shown as it is."""
    tame = _Page(write_html(_report(), tmp_path / "tame.html").read_text("utf-8"))
    page = _Page(write_html(_report(text), tmp_path / "page.html").read_bytes().decode("utf-8"))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in tame.tags]
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    shown = [data for tag, data in page.text if tag in ("dt", "dd", "span", "h1", "b")]
    assert {text, f"Shift of {text}"} <= {*shown}
    assert [image["alt"] for image in page.all("img")[2:4]] == [text, text]


def test_the_page_shows_every_concept(tmp_path: Path) -> None:
    """Three forms side by side with words, samples and numbers; tables and both figures on top."""
    report = _report()
    page = _Page(write_html(report, tmp_path / "page.html").read_text("utf-8"))
    ids = [section["id"] for section in page.all("section")]
    assert ids == ["new", "lost", "concept-0", "concept-1", "concept-2", "concept-3"]
    assert [data for tag, data in page.text if tag == "h3"] == ["original", "shifted", "fine-tuned"] * 4
    texts = [data for _, data in page.text]
    assert texts.count("0.100 → 0.500") == 4
    assert "no concept of the fine-tuned model is its partner" in texts
    # Six pictures of each concept, four of the one without a partner, behind the figures.
    images = [Image.open(io.BytesIO(base64.b64decode((i["src"] or "").split(",")[1]))) for i in page.all("img")]
    assert [image.size for image in images[2:]] == [(128, 85)] * 22
    assert [image.width for image in images[:2]] == [1232, 1232]
    captions = [data for tag, data in page.text if tag == "b" and data in ("red", "red after")]
    assert [caption.endswith("after") for caption in captions[:6]] == [False, False, True, True, True, True]
    marked = [t for t, a in page.tags if a.get("class") == "shared"]
    assert len(marked) == sum(word.text in f.shared for card in report.cards for f in card.forms for word in f.words)
    assert len(marked) >= 6


def test_the_tables_of_the_page(tmp_path: Path) -> None:
    """Means of all forms, and what is gained over each control, as the study's tables have them."""
    report = _report()
    page = _Page(write_html(report, tmp_path / "page.html").read_text("utf-8"))
    cells = [data for tag, data in page.text if tag == "td"]
    forms = {row["form"]: row for row in form_rows(report.study)}
    for form in FORMS:
        place = cells.index(form)
        assert cells[place + 1] == f"{forms[form]['cosine']:.3f}"
    heads = [data for tag, data in page.text if tag == "th"]
    assert [head for head in heads if head in CONTROLS] == list(CONTROLS)
    row = cells[cells.index("cosine") + 1 :][: len(CONTROLS)]
    means = [found["mean"] for found in comparison_rows(report.study)[: len(CONTROLS)]]
    assert [float(cell.split()[0]) for cell in row] == pytest.approx(means, abs=5e-4)


def test_concepts_without_rows_and_without_words(tmp_path: Path) -> None:
    """They are listed, not drawn; a report without words, pictures and texts is written all the same."""
    page = _Page(write_html(_report(empty=True, known=False), tmp_path / "page.html").read_text("utf-8"))
    assert "empty" in [section["id"] for section in page.all("section")]
    assert "concepts 0" in [data for _, data in page.text]
    assert "concept-0" not in [section["id"] for section in page.all("section")]
    bare = build_report(*made_up(PCA(2), words=False))
    page = _Page(write_html(bare, tmp_path / "bare.html").read_text("utf-8"))
    assert len(page.all("img")) == 2
    assert "words" not in [data for tag, data in page.text if tag == "th"]
    assert _read(write_tensorboard(bare, tmp_path / "board")).Tags()["images"] == [
        "shift/recovery",
        "shift/correlation",
    ]
    assert sheet(bare.cards[0]) is None


@pytest.mark.parametrize("text", ["red", *HOSTILE])
def test_markdown(text: str) -> None:
    """As TensorBoard shows it: one row per word, the text as it is; lists of new and lost ones."""
    report = _report(text)
    rows = _rows(card_markdown(report.cards[0]))
    assert rows[0][:2] == ["30", "20"]
    assert " ".join(rows[1][0].split()) == " ".join(text.split())
    assert [row[1] for row in rows[1:]] == ["0.750", "0.250", "0.167"] * 3
    table = _rows(overview_markdown(report))
    assert [row[0] for row in table[: len(FORMS)]] == list(FORMS)
    assert {len(row) for row in table[: len(FORMS)]} == {7}
    assert {len(row) for row in table[len(FORMS) :]} == {3}
    assert "## New" in overview_markdown(report)
    assert "## Lost" in overview_markdown(report)


def test_a_sheet_has_a_row_per_form() -> None:
    """Original, shifted and fine-tuned below each other, each picture below its form's name; gaps stay white."""
    card = _report().cards[0]
    forms = [replace(card.forms[0], samples=card.forms[0].samples[:1]), *card.forms[1:]]
    found = sheet(replace(card, forms=forms))
    assert found is not None
    centres = [[found.getpixel((70 + 134 * x, 76 + 134 * y)) for x in range(2)] for y in range(3)]
    assert centres[0][1] == (255, 255, 255)
    expected = [[s.image.getpixel((0, 0)) for s in form.samples if s.image is not None] for form in forms]
    assert [row[: len(own)] for row, own in zip(centres, expected, strict=True)] == expected


def test_tensorboard(tmp_path: Path) -> None:
    """Read back: a text and a sheet per concept, two figures, histograms, means as scalars, settings as hparams."""
    report = _report()
    events = _read(write_tensorboard(report, tmp_path))
    tags = events.Tags()
    assert [tag for tag in tags["images"] if tag.startswith("shift/")] == ["shift/recovery", "shift/correlation"]
    for card in report.cards:
        (tag,) = [tag for tag in tags["tensors"] if tag.startswith(f"concepts/{card.index:02d} red")]
        assert _text(events, tag) == card_markdown(card)
        assert [tag for tag in tags["images"] if tag.startswith(f"concepts/{card.index:02d} red")]
        drawn = events.Histograms(f"cosine of rows with the shift/{card.index:02d}")[0].histogram_value
        assert drawn.num == len(card.cosines)
    forms = {row["form"]: row for row in form_rows(report.study)}
    for form in FORMS:
        assert events.Scalars(f"cosine/{form}")[0].value == pytest.approx(forms[form]["cosine"])
    assert "explained/refitted" not in tags["scalars"]
    gained = comparison_rows(report.study)[1]
    assert events.Scalars("gain in cosine/over global")[0].value == pytest.approx(gained["mean"])
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (started["method"].string_value, started["alpha"].number_value) == ("KMeans", 1)
    assert (started["hook"].string_value, started["fine-tuned"].string_value) == ("blocks.1", "other")
