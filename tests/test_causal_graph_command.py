"""The command: graphs, their verification and controls on the small models; LVLM-Interpret's faults."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from analyses.analyse_command import COMMANDS
from analyses.causal_graph_command import FILE, MEASURES, Judge, main
from analyses.result import Result
from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM

FEW = [
    *("--model.id", "small:llava", "--data", "ScenesDataModule", "--data.task", "question", "--data.size", "2"),
    *("--tokens", "first", "--draws", "20", "--chance", "4", "--budget", "60"),
]


def run(folder: Path, *options: str) -> tuple[list[dict[str, Any]], Result]:
    """What is written."""
    main([*FEW, "--output", str(folder), *options])
    return json.loads((folder / FILE).read_text())["graphs"], Result.load(folder)


@pytest.fixture(scope="module")
def written(llava: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Result, Path]:
    """One run at the last layer with a wide graph."""
    folder = tmp_path_factory.mktemp("causal") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hooked_mm.hooked.HookedMM.small", lambda *_, **__: llava)
        return (*run(folder), folder)


def test_lvlm_interpret_the_causality_tab_is_not_disabled(
    written: tuple[list[dict[str, Any]], Result, Path],
) -> None:
    """The command is listed, and shows a graph and a picture for every token and head."""
    assert COMMANDS["causal-graph"][0] == "causal_graph_command"
    graphs, result, folder = written
    assert len(graphs) == 2 * 2
    page = (folder / "gallery.html").read_text()
    assert page.count("<img") == 2 * len(graphs)
    assert [score.layer for score in result.of("tokens of an explanation")] == [5]


def test_lvlm_interpret_verification_is_not_left_out(written: tuple[list[dict[str, Any]], Result, Path]) -> None:
    """Every explanation says whether masking it changes the prediction, beside tokens by chance."""
    graphs, result, _ = written
    known = [graph for graph in graphs if graph["explanation"]]
    assert known
    for graph in known:
        checked = graph["verification"]
        assert checked["status"] in ("smallest", "irreducible", "none", "unknown")
        assert checked["verified"] == bool(checked["subset"])
        assert set(checked["subset"]) <= set(graph["explanation"])
        assert checked["verified"] == (checked["predicts"] not in (None, graph["token"]))
        assert 0 < checked["tried"] <= 60
        assert 0 <= graph["chance_changes"] <= 1
    assert result.of("explanations verified")[0].rows == len(known)
    assert any("masked runs" in note for note in result.notes)


def test_graphs_are_well_formed(written: tuple[list[dict[str, Any]], Result, Path]) -> None:
    """Edges join nodes in their order, arrowheads at the later; costs are told."""
    for graph in written[0]:
        positions = [node["position"] for node in graph["nodes"]]
        assert positions == sorted(positions)
        assert graph["complete"]
        assert graph["tests"][0] == len(positions) * (len(positions) - 1) / 2
        for a, b, sign in graph["edges"]:
            assert a < b
            assert sign in ("o->", "-->", "<->")
        assert set(map(int, graph["paths"])) == set(graph["explanation"])


@pytest.mark.usefixtures("loaded")
def test_lvlm_interpret_alpha_and_threshold_are_passed_through(
    written: tuple[list[dict[str, Any]], Result, Path], tmp_path: Path
) -> None:
    """Settings reach the graphs, and are written beside them."""
    few = ["--threshold", "0.02", "--most_images", "8", "--data.size", "1"]
    strict, result = run(tmp_path / "one", "--alpha", "1e-12", *few)
    assert [result.settings[name] for name in ("alpha", "threshold", "most_images")] == [1e-12, 0.02, 8]
    assert sum(len(graph["nodes"]) for graph in strict) < sum(len(graph["nodes"]) for graph in written[0][:2])
    assert all(node["attention"] > 0.02 for graph in strict for node in graph["nodes"][:-1])
    assert all(sum(node["image"] for node in graph["nodes"]) <= 8 for graph in strict)
    loose, _ = run(tmp_path / "two", "--alpha", "0.1", *few)
    # The larger alpha is, the fewer pairs are taken for independent.
    assert sum(len(graph["edges"]) for graph in loose) > sum(len(graph["edges"]) for graph in strict)


@pytest.mark.usefixtures("loaded")
def test_layers_heads_tokens_and_the_mean(tmp_path: Path) -> None:
    """As they are asked for; by the mean only image tokens are masked."""
    graphs, result = run(
        tmp_path / "out",
        "--data.size",
        "1",
        "--layer",
        "2",
        "--heads",
        "[1]",
        "--tokens",
        "[0, 5]",
        "--how",
        "mean",
        "--shown",
        "1",
    )
    assert {(graph["layer"], graph["head"]) for graph in graphs} == {(2, 1)}
    assert len(graphs) == 1
    for graph in graphs:
        assert all(graph["nodes"][node]["image"] for node in graph["verification"]["subset"])
    assert result.settings["how"] == "mean"
    assert not any("left out" in note for note in result.notes)
    with pytest.raises(BadInputError, match="layer=9"):
        run(tmp_path / "wrong", "--layer", "9")


@pytest.mark.usefixtures("loaded")
def test_answers_are_needed(tmp_path: Path) -> None:
    """Without an answer, or one that is long enough, there is nothing to explain."""
    with pytest.raises(BadInputError, match="answer"):
        run(tmp_path / "out", "--answer", "none")
    with pytest.raises(BadInputError, match="other --tokens"):
        run(tmp_path / "long", "--tokens", "[40]")


def test_samples_without_a_picture_are_counted(llava: HookedMM, images: list[Image.Image]) -> None:
    """And those whose answer is too short; the others are explained."""
    options = {
        "tokens": [1],
        "layer": None,
        "heads": 1,
        "threshold": 0.05,
        "most_images": 4,
        "alpha": 1e-5,
        "samples": 128,
    }
    options |= {"depth": 1, "most_conditions": 1, "most_tests": 99, "how": "knockout", "budget": 2, "at_once": 2}
    judge = Judge(llava, SimpleNamespace(**options, chance=0, shown=1), np.random.default_rng(0))
    text, answers = "what colour is the star ?", ["red star", "red star", "red"]
    shown = [images[0], None, images[1]]
    items = [Sample(f"s{n}", shown[n], text, answers[n], {}) for n in range(3)]
    left_out = judge.batch(items, llava.prepare(shown, text, answers=answers), [None] * 3)
    assert left_out == ["s2: no answer with such a token", "s1: no picture"]
    assert [one.sample for one in judge.found] == ["s0"]
    assert [entry.title for entry in judge.entries] == ["s0: 'star'"]


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_verified_tokens_lie_on_the_asked_object(tmp_path: Path) -> None:
    """Where an explanation holds up, its image tokens lie on the object far more than image tokens do."""
    result = run(tmp_path / "out", "--data.size", "30", "--layer", "2", "--heads", "4", "--shown", "0")[1]
    (found,), (area,) = (result.of(name) for name in list(MEASURES)[-2:])
    assert found.low > 2 * area.high
