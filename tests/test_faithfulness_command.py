"""The command that holds attribution methods against truth and answer: its table, its controls, what it leaves out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from analyses.analyse_command import main as analyse
from analyses.attribution_methods import METHODS
from analyses.faithfulness_command import CONTROLS, asked_of, judge, main
from analyses.result import Result
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.pairs import scene_pair
from tests.pages import broken_links, run_page


def test_what_is_asked_for_and_the_rest_do_not_overlap() -> None:
    pair = scene_pair("test", 3, "colour", count=3)
    found = asked_of(pair)
    assert found.others is not None
    assert not bool((found.mask & found.others).any())
    assert pair.index is not None
    assert float((torch.from_numpy(render(pair.one)[1][pair.index]) > 0.5).double().mean()) == pytest.approx(
        float(found.mask.double().mean())
    )
    with pytest.raises(BadInputError, match="asks for no object"):
        asked_of(scene_pair("test", 0, "place"))


@pytest.mark.usefixtures("loaded")
def test_the_command_writes_a_table_of_methods_beside_controls(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = ["--model.id", "small:llava", "--size", "4", "--steps", "2", "--methods", "[attention, gradient]"]
    main([*few, "--pictures", "2", "--draws", "20", "--output", str(tmp_path / "out")])
    with open(tmp_path / "out" / "faithfulness.csv", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    assert {row[0] for row in rows} == {"attention", "gradient", *CONTROLS}
    by = {row[0]: dict(zip(header[1:], map(float, row[1:]), strict=True)) for row in rows}
    assert by["ideal"]["share of ideal"] == 1.0
    assert by["attention"]["pixel AUROC"] > 0.9 > by["random"]["pixel AUROC"]
    assert by["attention"]["deletion"] < by["random"]["deletion"]
    result = Result.load(tmp_path / "out")
    (score,) = result.of("pixel AUROC, gradient")
    assert score.low <= score.value <= score.high
    page = (tmp_path / "out" / "gallery.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2 * 5
    assert "share of ideal" in capsys.readouterr().out


def test_wrong_answers_are_counted_and_a_method_that_can_not_be_is_told(
    llava: HookedMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [scene_pair("test", index, "colour") for index in range(3)]
    said = type("Said", (), {"text": [pairs[0].answers[0], "a fish", pairs[2].answers[0]], "tokens": torch.ones(3, 1)})
    monkeypatch.setattr(HookedMM, "generate", lambda *_, **__: said)

    def refuses(_: object) -> None:
        raise BadInputError("no pattern")

    monkeypatch.setitem(METHODS, "none", (refuses, ""))
    found = judge(llava, pairs, ["gradient", "none"], steps=0)
    assert found.wrong == 1
    assert len(found.values["gradient"]["IoU"]) == 2
    assert found.refused == {"none": "no pattern"}
    assert len(judge(llava, pairs, ["gradient"], steps=0, only_right=False).values["gradient"]["IoU"]) == 3
    with pytest.raises(BadInputError, match="attribution method"):
        judge(llava, pairs, ["gradeint"])


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an answer rests on: every command and the Python of the page."""
    monkeypatch.chdir(tmp_path)
    run_page("attribution.md", analyse=analyse)
    assert (tmp_path / "relevancy.png").is_file()
    for name in ("attention", "sinks", "relevancy", "gradcam", "shares", "patching", "knockout", "ablation", "causal"):
        assert (tmp_path / "runs" / name / "result.json").is_file(), name
    assert not broken_links("attribution.md")
