"""Measured accuracies: intervals against scipy, files that come back as they were, refusals."""

from __future__ import annotations

from math import isnan
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from hooked_mm.errors import BadInputError
from hooked_mm.small.accuracy import FILE, Accuracy, Captions, Share, mean

SHARES = st.tuples(st.integers(0, 60), st.integers(1, 60)).map(lambda n: Share(n[0], n[0] + n[1]))
TYPES = st.dictionaries(st.sampled_from(["colour", "shape at", "relation"]), SHARES)
CAPTIONS = st.builds(Captions, SHARES, st.dictionaries(st.sampled_from(["full", "short"]), st.integers(0, 9)), TYPES)
ACCURACIES = st.builds(
    Accuracy,
    seed=st.integers(0, 9),
    questions=st.dictionaries(st.sampled_from(["test", "unseen", "held-out object"]), TYPES),
    wrong_image=TYPES,
    wrong_image_captions=SHARES,
    chance=TYPES,
    captions=st.dictionaries(st.sampled_from(["test", "unseen"]), st.dictionaries(st.sampled_from(["any"]), CAPTIONS)),
)


@given(SHARES)
def test_the_interval_is_wilsons(share: Share) -> None:
    """As scipy computes it."""
    expected = binomtest(share.right, share.of).proportion_ci(0.95, "wilson")
    assert share.interval == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_nothing_counted() -> None:
    """No share, everything possible, and no part in a mean."""
    empty = Share(0, 0)
    assert isnan(empty.value)
    assert empty.interval == (0, 1)
    assert str(empty) == "-"
    assert mean({"a": empty, "b": Share(1, 2), "c": Share(5, 5)}) == 0.75
    assert isnan(mean({"a": empty}))
    assert Share(1, 3) + Share(2, 4) == Share(3, 7)


@given(ACCURACIES)
def test_what_is_written_is_read(found: Accuracy) -> None:
    """Equal after a way through JSON."""
    assert Accuracy.from_json(found.to_json()) == found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seed": 0, "questions": {"test": {"colour": 0.9}}}'])
def test_other_files_are_refused(text: str) -> None:
    """With the remedy."""
    with pytest.raises(BadInputError, match=r"not what a small model's evaluation writes.*hooked_mm.small.evaluate"):
        Accuracy.from_json(text)


def test_a_model_that_was_not_measured(tmp_path: Path) -> None:
    """Says how to measure it."""
    with pytest.raises(BadInputError, match=rf"{FILE}' does not exist; measure: python -m hooked_mm.small.evaluate"):
        Accuracy.load(tmp_path)
