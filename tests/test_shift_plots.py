"""The figures hold the study's numbers: read back from what is drawn, not from pixels alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection

from concept_dict.gains import gain
from concept_dict.pca import PCA
from concept_dict.shift_plots import correlation_figure, correlation_text, figure_image, recovery_figure
from concept_dict.shift_study import ShiftStudy
from hooked_mm.errors import BadInputError
from tests.shifts import made_up, told, with_enough


@pytest.fixture(scope="module")
def study() -> ShiftStudy:
    """Of k-means with four concepts."""
    return made_up()[0]


@pytest.fixture(scope="module")
def known(study: ShiftStudy) -> ShiftStudy:
    """The same with scores that are easy to count with: gains .4, -.1, .2, none."""
    return with_enough(replace(study, recovery=told(study)), 20)


def _points(axes: Axes) -> list[PathCollection]:
    """The series of points that are not empty."""
    return [item for item in axes.collections if isinstance(item, PathCollection) and len(item.get_offsets())]


def test_before_and_after(known: ShiftStudy) -> None:
    """Sorted by gain, the largest on top (drawn last); concepts without a partner left out; ceiling beside."""
    figure = recovery_figure(known, names=["red", "blue", "sea", "ring"])
    cosine, words = figure.axes
    assert [label.get_text() for label in cosine.get_yticklabels()] == ["1 blue", "2 sea", "0 red"]
    before, after = _points(cosine)
    assert np.asarray(before.get_offsets()) == pytest.approx(np.array([[0.2, 0], [0.3, 1], [0.1, 2]]))
    assert np.asarray(after.get_offsets()) == pytest.approx(np.array([[0.1, 0], [0.5, 1], [0.5, 2]]))
    assert cosine.lines[0].get_xdata() == pytest.approx([0.26, 0.36, 0.16])
    assert cosine.get_title() == "cosine: better for 2, worse for 1 of 3 concepts"
    assert words.get_xlabel() == "words"
    assert "hollow: too few rows to count" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_too_few_rows_are_hollow(known: ShiftStudy) -> None:
    """White inside, in both plots: concept 2 has 19 rows; with 19 asked for it is as the others."""

    def hollow(enough: int) -> list[list[bool]]:
        study = with_enough(known, enough)
        axes = [*recovery_figure(study).axes[:1], *correlation_figure(study).axes]
        return [[bool((c[:3] == 1).all()) for c in _points(a)[-1].get_facecolors()] for a in axes]

    bars, consistency, magnitude = hollow(20)
    assert bars == [False, True, False]
    # Large ones first: 30, 20, 19 rows.
    assert consistency == magnitude == [False, False, True]
    assert not any(any(found) for found in hollow(19))


def test_what_recovery_goes_with(known: ShiftStudy) -> None:
    """A point per concept that has a gain: its area with its rows; the correlation with its interval on top."""
    figure = correlation_figure(known)
    for axes, values, name in zip(
        figure.axes,
        (known.shifts.pairwise.numpy(), known.shifts.magnitude.numpy()),
        ("consistency", "magnitude"),
        strict=True,
    ):
        (points,) = _points(axes)
        expected = np.stack([values, gain(known.recovery, "cosine")], axis=1)[:3]
        assert np.asarray(points.get_offsets()) == pytest.approx(expected)
        assert points.get_sizes() == pytest.approx([24 + 320 * rows / 40 for rows in (30, 20, 19)])
        assert [text.get_text() for text in axes.texts] == ["0", "1", "2"]
        found = known.correlations[f"{name} with gain in cosine"]
        assert axes.get_title() == correlation_text(found)
        assert (
            f"r = {found.pearson:.2f} [{found.low:.2f}, {found.high:.2f}], ρ = {found.spearman:.2f}" in axes.get_title()
        )


def test_scores_that_were_not_computed() -> None:
    """No panel for words that nobody decoded; both ends of a signed method stand by their names."""
    study, _ = made_up(PCA(2), words=False)
    figure = recovery_figure(study)
    assert [axes.get_xlabel() for axes in figure.axes] == ["cosine"]
    assert {label.get_text() for label in figure.axes[0].get_yticklabels()} <= {"0 +", "1 +", "0 −", "1 −"}
    assert recovery_figure(study, ["words"]).axes[0].get_xlabel() == ""
    assert recovery_figure(study, ["distance"]).axes[0].get_xlabel() == "distance (lower is better)"


@pytest.mark.parametrize("options", [{"same": True}, {"empty": True}])
def test_nothing_moved_or_no_rows(options: dict[str, bool]) -> None:
    """Drawn all the same, and the title says that there is no correlation where there is none."""
    study, _ = made_up(**options)
    for figure in (recovery_figure(study), correlation_figure(study)):
        assert np.asarray(figure_image(figure)).std() > 0
    if "same" in options:
        assert correlation_figure(study).axes[0].get_title().startswith("no correlation: 0 concepts")


def test_names_are_shown_as_they_are(known: ShiftStudy) -> None:
    """No text is read as mathematics; long ones are cut; one line each."""
    names = ["$\\frac$", "two\nlines", "long " * 20, "$"]
    figure = recovery_figure(known, names=names)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown[:2] == ["1 two lines", "2 long long long long long…"]
    figure_image(figure)
    with pytest.raises(BadInputError, match="3 names for 4"):
        recovery_figure(known, names=names[:3])
    with pytest.raises(BadInputError, match="cosine"):
        recovery_figure(known, ["cosin"])


def test_a_picture_is_what_is_drawn(known: ShiftStudy) -> None:
    """As large as asked for, on white, and unknown to pyplot."""
    figure = correlation_figure(known)
    image = figure_image(figure, 50)
    assert (image.size, image.mode) == ((560, 240), "RGB")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert pyplot.get_fignums() == []
