"""CIDEr against pycocoevalcap's on the same tokens, and what its definition says of plain cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from hooked_mm.errors import BadInputError
from steering.cider import CIDEr, cider

CAPTION = st.lists(st.sampled_from(["a", "the", "red", "cat", "sits", "on", "mat", "in"]), max_size=14)
RARE = st.lists(st.text("abcdé'", min_size=1, max_size=2), max_size=25)
PICTURES = st.lists(
    st.tuples(CAPTION | RARE, st.lists(CAPTION | RARE, min_size=1, max_size=5)), min_size=1, max_size=12
)


def theirs(candidates: list[list[str]], references: list[list[list[str]]]) -> tuple[float, np.ndarray]:
    """pycocoevalcap's, which splits captions at white space; it asserts that some reference has a word."""
    return Cider().compute_score(
        {place: [" ".join(tokens) for tokens in given] for place, given in enumerate(references)},
        {place: [" ".join(tokens)] for place, tokens in enumerate(candidates)},
    )


@settings(max_examples=150)
@given(pictures=PICTURES)
def test_equals_pycocoevalcap(pictures: list[tuple[list[str], list[list[str]]]]) -> None:
    """Mean and every score, with empty captions, words of no reference and captions of any length."""
    candidates, references = [own for own, _ in pictures], [given for _, given in pictures]
    if not any(tokens for given in references for tokens in given):
        references[0] = [["cat"]]
    mean, scores = cider(candidates, references)
    expected, each = theirs(candidates, references)
    assert mean == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(scores.numpy(), each, atol=1e-9)


def test_equals_pycocoevalcap_on_captions_like_people_write_them() -> None:
    """Forty pictures, five references each, candidates that share phrases: scores that are not near zero."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{rank}" for rank in range(200)])
    common = 1 / np.arange(1, 201)
    draw = lambda: list(rng.choice(words, rng.integers(6, 14), p=common / common.sum()))  # noqa: E731
    references = [[draw() for _ in range(5)] for _ in range(40)]
    candidates = [given[0][:5] + given[1][2:7] for given in references]
    metric = CIDEr()
    for start in range(0, 40, 7):
        metric.update(candidates[start : start + 7], references[start : start + 7])
    expected = theirs(candidates, references)[0]
    assert expected > 1
    assert cider(candidates, references)[0] == pytest.approx(expected, abs=1e-9)
    assert metric.compute() == pytest.approx(expected, abs=1e-9)


def test_what_the_definition_says() -> None:
    """A copy of the only reference scores 10 if no picture shares its words, 0 if all share them; alone, 0."""
    one, two = "a red cat sits here".split(), "some blue dogs run there".split()
    assert cider([one, two], [[one], [two]])[1].tolist() == pytest.approx([10, 10])
    assert cider([one, two], [[two], [one]])[1].tolist() == [0, 0]
    assert cider([one, one], [[one], [one]])[1].tolist() == [0, 0]
    assert cider([one], [[one]])[0] == 0


def test_refuses_what_has_no_score() -> None:
    """No pictures, no reference, lists that differ."""
    with pytest.raises(BadInputError, match="no captions"):
        cider([], [])
    with pytest.raises(BadInputError, match="sample 1: no reference"):
        cider([["a"], ["b"]], [[["a"]], []])
    with pytest.raises(BadInputError, match="1 candidates, 2 references"):
        CIDEr().update([["a"]], [[["a"]], [["b"]]])
    empty = CIDEr()
    empty.update([], [])
    with pytest.raises(BadInputError, match="no captions"):
        empty.compute()
