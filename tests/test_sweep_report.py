"""A sweep's page and its run of TensorBoard: complete, self-contained, and unharmed by hostile text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hooked_mm.drawing import data_uri, enlarge
from steering.sweep_report import overview_markdown, series_names, write_html, write_tensorboard
from steering.sweep_result import SweepResult, steered
from steering.sweep_tables import front_rows, verdicts
from tests.sweeps import ALPHAS, made_up, row, scored
from tests.test_cards import HOSTILE, _Page, _read, _rows, _text

COLOURS = ("red", "blue", "green", "orange", "purple")


def _picture(index: int) -> Image.Image:
    return Image.new("RGB", (32, 16), COLOURS[index])


def _page(result: SweepResult, path: Path, pictures: bool = False) -> _Page:
    # As bytes, since reading as text would turn the line ends into one kind.
    made = write_html(result, path / "sweep.html", pictures=_picture if pictures else None)
    return _Page(made.read_bytes().decode("utf-8"))


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    """Pictures and figures as data, no scripts; text that is HTML is shown as it is."""
    hostile = " ".join(HOSTILE)
    made = made_up(hostile)
    for one in made.rows:
        # Within the names of controls too, so that they remain the controls of these vectors.
        vector = one["vector"].replace("coarse", f"coarse {hostile}").replace("fine", f"fine {hostile}")
        one |= {"vector": vector, "gate": hostile, "at": hostile}
    tame, page = _page(made_up(), tmp_path), _page(made, tmp_path, True)
    assert [tag for tag, _ in page.tags if tag not in ("img", "th", "td")] == [
        tag for tag, _ in tame.tags if tag not in ("img", "th", "td")
    ]
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    shown = [data for _, data in page.text]
    assert {f"Steering: {hostile} -> blue", f"scenes: {hostile}", hostile} <= {*shown}
    assert shown.count(hostile) >= len(made.examples)


def test_the_page_shows_all_of_it(tmp_path: Path) -> None:
    """Verdict, figures, front, every setting of both splits, and examples with their pictures."""
    result = made_up()
    page = _page(result, tmp_path, True)
    shown = [data for _, data in page.text]
    assert verdicts(result)[0] in shown
    assert [one["alt"] for one in page.all("img")] == [
        "Effect against damage, test",
        "Effect and damage against alpha, test",
        "Effect by layer and alpha, test (✓: goal met)",
        *(f"sample s{n}" for n in range(5)),
    ]
    assert [one["src"] for one in page.all("img")][3:] == [data_uri(enlarge(_picture(n), 128)) for n in range(5)]
    roles = [attributes.get("class") for tag, attributes in page.tags if tag == "tr"]
    assert len(roles) == 3 + len(front_rows(result, "test")) + len(result.rows)
    assert roles.count("chosen") == 3
    assert roles.count("unsteered") == 3
    for text in ("Samples that shall change", "Other samples of the same type", "Samples of other types"):
        assert text in shown
    (one,) = {f"{row['effect'] * 100:.1f}" for row in result.of("test") if row["chosen"]}
    assert shown.count(one) >= 2


def test_examples_without_pictures_or_of_other_settings(tmp_path: Path) -> None:
    """No gap where there is no picture; the number of a setting that is not the chosen one."""
    made = made_up()
    examples = [made.examples[0] | {"picture": None}, made.examples[1] | {"setting": 7, "about": "captions"}]
    page = _page(replace(made, examples=examples), tmp_path, True)
    assert [one["alt"] for one in page.all("img")][3:] == ["sample s1"]
    shown = [data.strip() for _, data in page.text]
    assert "captions" in shown
    assert "sample s1, setting 7" in shown
    assert "sample s0" in shown
    assert [one["alt"] for one in _page(made, tmp_path).all("img")][3:] == []


@pytest.mark.parametrize(
    "result",
    [
        made_up(controls=False),
        made_up(damage=False),
        SweepResult({"name": "one"}, [], [row(1, "validation", "v", None, 1.0, **scored(0.5, 0.1))]),
        SweepResult({}, [], [row(1, "test", "v", 2, 1.0)]),
        SweepResult({}),
    ],
    ids=["no controls", "no damage", "one setting", "no numbers", "no rows"],
)
def test_whatever_is_missing(result: SweepResult, tmp_path: Path) -> None:
    """A page and a run all the same, without NaN, with what there is said."""
    page = _page(result, tmp_path)
    text = " ".join(data for _, data in page.text)
    assert verdicts(result)[0] in text
    assert "nan" not in text.lower().split()
    write_tensorboard(result, tmp_path / "board")


def test_tensorboard(tmp_path: Path) -> None:
    """Effect and damage over the alphas' places, figures, and the front as a table."""
    result = made_up()
    events = _read(write_tensorboard(result, tmp_path))
    tags = events.Tags()
    assert len(tags["scalars"]) == 2 * 2 * (2 + 4) * 4
    mine = [r for r in steered(result.of("test")) if (r["vector"], r["layer"]) == ("fine 3→7", 3)]
    found = events.Scalars("damage (test)/fine 3→7, layer 3")
    assert [event.step for event in found] == list(range(len(ALPHAS)))
    assert [event.value for event in found] == pytest.approx([one["damage"] for one in mine])
    assert "effect (validation)/random for coarse, seed 0, layer 1" in tags["scalars"]
    assert [tag.split("/")[1] for tag in tags["images"]] == [
        "Effect against damage",
        "Effect and damage against alpha",
        "Effect by layer and alpha",
    ]
    text = _text(events, "sweep/text_summary")
    assert len(_rows(text)) == len(front_rows(result, "test"))
    assert "0 \\= 0\\.5" in text or "0 = 0\\.5" in text


def test_markdown_is_text() -> None:
    """Marks, bars and HTML in names are no Markdown."""
    text = overview_markdown(made_up("<script>|*b*"))
    assert "<script>" not in text
    assert "*b*" not in text.replace("\\*b\\*", "")


def test_series_are_told_apart() -> None:
    """By what differs among them, and only that; controls by their kind if their name does not say it."""
    one = row(1, "test", "v", 2, 1.0)
    assert series_names([one, one | {"at": "all"}]) == ["v, layer 2, at last", "v, layer 2, at all"]
    assert series_names([one, one | {"control": "random"}]) == ["v, layer 2", "v random, layer 2"]
    assert series_names([one | {"vector": "random for v", "control": "random"}]) == ["random for v, layer 2"]
