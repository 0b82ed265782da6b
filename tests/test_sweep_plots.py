"""The figures hold the sweep's numbers: read back from what is drawn, not from pixels alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from concept_dict.shift_plots import figure_image
from hooked_mm.errors import BadInputError
from steering.sweep_plots import MOST, alpha_figure, figures, layer_figure, most_settings, tradeoff_figure
from steering.sweep_result import Row, SweepResult, steered
from tests.sweeps import ALPHAS, GOAL, LAYERS, made_up, row, scored


@pytest.fixture(scope="module")
def sweep() -> SweepResult:
    """Four layers, eight alphas, two vectors, two kinds of controls."""
    return made_up()


def _drawn(axes: Axes) -> list[PathCollection]:
    """The series of points that are not empty."""
    return [item for item in axes.collections if isinstance(item, PathCollection) and len(item.get_offsets())]


def _named(axes: Axes, label: str) -> list[list[float]]:
    (found,) = [item for item in _drawn(axes) if item.get_label() == label]
    return np.asarray(found.get_offsets()).tolist()


def _names(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def _pairs(rows: list[Row]) -> list[list[float]]:
    return [[one["damage"], one["effect"]] for one in rows]


def test_every_setting_is_a_point(sweep: SweepResult) -> None:
    """Settings by layer and vector, controls apart and grey, the front, the ring, the model and the goal."""
    figure = tradeoff_figure(sweep, "test")
    assert figure is not None
    (axes,), rows = figure.axes, sweep.of("test")
    settings = [item for item in _drawn(axes) if str(item.get_label()).startswith("_")]
    assert len(settings) == 8
    points = np.concatenate([np.asarray(item.get_offsets()) for item in settings])
    assert sorted(points.tolist()) == sorted(_pairs(steered(rows)))
    assert len({tuple(item.get_facecolor()[0]) for item in settings}) == len(LAYERS)
    for control in ("random", "shuffled"):
        mine = [one for one in steered(rows, control=True) if one["control"] == control]
        assert _named(axes, f"control: {control}") == _pairs(mine)
    assert _named(axes, "chosen") == _pairs([one for one in rows if one["chosen"]])
    assert _named(axes, "unsteered") == _pairs(rows[:1])
    (front,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    assert np.stack(front.get_data(), axis=1).tolist() == sorted(_pairs([one for one in rows if one["front"]]))
    assert front.get_drawstyle() == "steps-post"
    (region,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert (region.get_y(), region.get_x() + region.get_width()) == pytest.approx((GOAL["effect"], GOAL["damage"]))
    assert {"goal", "layer 1", "layer 4", "coarse", "fine 3→7"} <= {*_names(figure)}
    # The goal would be a sliver on a linear scale, and the axis says that it is none.
    assert (axes.get_xscale(), axes.get_xlabel()) == ("symlog", "damage (%), logarithmic beyond 2 %")
    assert axes.get_xlim()[1] > max(one["damage"] for one in rows)


def test_ticks_are_percent(sweep: SweepResult) -> None:
    """On scales that bring a way of writing of their own too."""
    figure = tradeoff_figure(sweep)
    assert figure is not None
    figure_image(figure, 40)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()][:5] == ["0", "1", "2", "5", "10"]
    assert {"0", "20", "100"} <= {label.get_text() for label in axes.get_yticklabels()}


def test_against_alpha(sweep: SweepResult) -> None:
    """A row of panels per vector: a line per layer, its own controls dashed and dotted, intervals, goal and ring."""
    figure = alpha_figure(sweep, "validation")
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["coarse", "coarse", "fine 3→7", "fine 3→7"]
    rows = sweep.of("validation")
    for axes, (vector, score) in zip(
        figure.axes, [(v, s) for v in ("coarse", "fine 3→7") for s in ("effect", "damage")], strict=True
    ):
        for layer in LAYERS:
            (line,) = [found for found in axes.lines if found.get_label() == f"layer {layer}"]
            mine = [one[score] for one in steered(rows) if (one["vector"], one["layer"]) == (vector, layer)]
            assert np.asarray(line.get_xdata()).tolist() == list(ALPHAS)
            assert np.asarray(line.get_ydata()).tolist() == mine
            assert line.get_linestyle() == "-"
        for control, style in (("random", "--"), ("shuffled", ":")):
            lines = [found for found in axes.lines if found.get_label() == f"control: {control}"]
            assert len(lines) == len(LAYERS)
            assert {found.get_linestyle() for found in lines} == {style}
            mine = [one[score] for one in rows if one["vector"] == f"{control} for {vector}, seed 0"]
            assert sorted(y for found in lines for y in np.asarray(found.get_ydata())) == sorted(mine)
        (goal,) = [found for found in axes.lines if found.get_label() == "goal"]
        assert set(np.asarray(goal.get_ydata()).tolist()) == {GOAL[score]}
        assert [len(found.get_offsets()) for found in _drawn(axes)] == ([1] if vector != "coarse" else [])
    assert "chosen" in _names(figure)


def test_intervals_are_drawn() -> None:
    """From the lower to the upper end, of a setting and of its control; none where there is none."""
    with_one = row(1, "test", "v", 2, 1.0) | {"effect": 0.5, "effect_low": 0.4, "effect_high": 0.75}
    control = row(2, "test", "c", 2, 1.0, control="random") | {"effect": 0.1, "effect_low": 0.05, "effect_high": 0.2}
    without = row(3, "test", "v", 2, 2.0) | {"effect": 0.6}
    figure = alpha_figure(SweepResult({}, [], [with_one, control, without]))
    assert figure is not None
    (axes,) = figure.axes
    segments = [np.asarray(s)[:, 1] for item in axes.collections for s in getattr(item, "get_segments", list)()]
    assert np.array(sorted(map(tuple, segments))) == pytest.approx(np.array([[0.05, 0.2], [0.4, 0.75], [0.6, 0.6]]))
    assert axes.get_title() == ""


def test_layers_and_alphas(sweep: SweepResult) -> None:
    """A panel per vector with the effects; a mark where the goal is met; the chosen cell framed."""
    figure = layer_figure(sweep, "validation")
    assert figure is not None
    rows = steered(sweep.of("validation"))
    for axes, vector in zip(figure.axes[:2], ("coarse", "fine 3→7"), strict=True):
        mine = [one for one in rows if one["vector"] == vector]
        drawn = np.asarray(axes.images[0].get_array())
        assert drawn.ravel().tolist() == [one["effect"] for one in mine]
        assert [text.get_text() for text in axes.texts] == [
            f"{100 * one['effect']:.0f}{'✓' if one['goal_met'] else ''}" for one in mine
        ]
        framed = [(patch.get_x() + 0.46, patch.get_y() + 0.46) for patch in axes.patches]
        expected = [(ALPHAS.index(o["alpha"]), LAYERS.index(o["layer"])) for o in mine if o["chosen"]]
        assert framed == [pytest.approx(place) for place in expected]
    assert any(one["goal_met"] for one in rows)


def test_the_best_of_several_ways_stands_in_a_cell() -> None:
    """What meets the goal before what has the larger effect."""
    rows = [row(n, "test", "v", n // 2, 1.0 + n % 2, **scored(0.1 * n, 0.0)) for n in range(4)]
    rows.append(row(4, "test", "v", 1, 2.0, at="all", **scored(0.95, 0.5)))
    rows.append(row(5, "test", "v", 1, 2.0, at="image", **scored(0.92, 0.01)))
    figure = layer_figure(SweepResult({"goal": GOAL}, [], rows))
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "10", "20", "92✓"]
    lines = alpha_figure(SweepResult({"goal": GOAL}, [], rows))
    assert lines is not None
    assert {"last, add", "all, add", "image, add"} <= {*_names(lines)}


def test_nothing_to_draw() -> None:
    """No damage: no trade-off, one panel per vector; no number: no figure; one setting: no map; no rows: nothing."""
    without = made_up(damage=False)
    assert tradeoff_figure(without) is None
    lines = alpha_figure(without)
    assert lines is not None
    assert [axes.get_ylabel() for axes in lines.axes] == ["effect (%)"] * 2
    assert [caption.split(",")[0] for caption, _ in figures(without)] == [
        "Effect and damage against alpha",
        "Effect by layer and alpha",
    ]
    empty = row(1, "test", "v", 2, 1.0)
    assert figures(SweepResult({}, [], [empty])) == []
    one = SweepResult({}, [], [row(1, "test", "v", None, 1.0, **scored(0.5, 0.0))])
    assert [caption.split(",")[0] for caption, _ in figures(one)] == [
        "Effect against damage",
        "Effect and damage against alpha",
    ]
    assert figures(SweepResult({})) == []
    with pytest.raises(BadInputError, match="no split in this sweep"):
        tradeoff_figure(one, "validation")


def test_without_controls_and_goal() -> None:
    """Neither is drawn nor named; a linear scale of damage."""
    result = replace(made_up(controls=False), task={})
    for _, figure in figures(result)[:2]:
        assert not [name for name in _names(figure) if "control" in name or "goal" in name]
        figure_image(figure, 40)
    figure = tradeoff_figure(result)
    assert figure is not None
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_xlabel()) == ("linear", "damage (%)")


@pytest.mark.parametrize("alphas", [(0.0, 1.0, 100.0), (-64.0, -1.0, 1.0, 64.0), (1.0, 1.5, 2.0), (3.0,)])
def test_alphas_of_any_kind(alphas: tuple[float, ...]) -> None:
    """Zero and negative ones on a scale that has them; a tick at each."""
    rows = [row(n, "test", "v", 2, alpha, **scored(0.5, 0.1)) for n, alpha in enumerate(alphas)]
    figure = alpha_figure(SweepResult({"goal": GOAL}, [], rows))
    assert figure is not None
    figure_image(figure, 40)
    axes = figure.axes[-1]
    assert axes.get_xticks().tolist() == sorted(alphas)
    assert axes.get_xscale() == ("symlog" if min(alphas) <= 0 else "linear")


def test_many_vectors() -> None:
    """Panels for the strongest, and the caption says so; points by kind, since marks would not do."""
    rows = [
        row(40 * n + 4 * layer + alpha, "test", f"fine {n}", layer, alpha + 1.0, kind="fine", **scored(n / 40, 0.01))
        for n in range(20)
        for layer in (1, 2)
        for alpha in (0, 1)
    ]
    made = dict(figures(SweepResult({"goal": GOAL}, [], rows)))
    some = f", test, the {MOST} vectors of 20 with the largest effects"
    lines = made[f"Effect and damage against alpha{some}"]
    assert [axes.get_title() for axes in lines.axes[::2]] == [f"fine {n}" for n in range(14, 20)]
    assert "fine" not in " ".join(_names(made["Effect against damage, test"]))
    assert len(made[f"Effect by layer and alpha{some} (✓: goal met)"].axes) == MOST + 1


def test_names_are_shown_as_they_are() -> None:
    """No text is read as mathematics; long ones are cut; one line each; and pyplot knows of no figure."""
    names = ["$\\frac$", "two\nlines", "long " * 20]
    rows = [row(n, "test", name, n, 1.0 + n, **scored(0.5, math.sqrt(n))) for n, name in enumerate(names)]
    made = figures(SweepResult({"goal": GOAL}, [], rows))
    for _, figure in made:
        figure_image(figure, 40)
    assert [axes.get_title() for axes in made[1][1].axes[::2]] == [
        "$\\frac$",
        "two lines",
        "long long long long long long lon…",
    ]
    assert pyplot.get_fignums() == []


def test_the_split_with_most_settings(sweep: SweepResult) -> None:
    """Test if both have as many: what is shown is held out then."""
    assert most_settings(sweep) == "test"
    fewer = [one for one in sweep.rows if one["split"] == "validation" or one["chosen"]]
    assert most_settings(replace(sweep, rows=fewer)) == "validation"
