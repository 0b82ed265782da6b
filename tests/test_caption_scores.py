"""Caption scores against pycocoevalcap's BLEU and CIDEr, and ROUGE-L by a longest common subsequence written out."""

from __future__ import annotations

import socket
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from hooked_mm.errors import BadInputError
from steering.caption_scores import CaptionScores, caption_scores, words_of

VOCABULARY = "a the red cat sits on mat in black dog runs".split()
CAPTION = st.lists(st.sampled_from(VOCABULARY), min_size=4, max_size=12).map(" ".join)
PICTURES = st.lists(st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=4)), min_size=2, max_size=10)


def rouge_l(own: list[str], other: list[str]) -> float:
    """F1 of the longest common subsequence, by recursion."""

    @cache
    def common(i: int, j: int) -> int:
        if i == len(own) or j == len(other):
            return 0
        if own[i] == other[j]:
            return 1 + common(i + 1, j + 1)
        return max(common(i + 1, j), common(i, j + 1))

    return 2 * common(0, 0) / (len(own) + len(other))


@settings(max_examples=40)
@given(pictures=PICTURES)
def test_equals_pycocoevalcap(pictures: list[tuple[str, list[str]]]) -> None:
    """BLEU-1 to 4 with references of any length, CIDEr, and ROUGE-L by hand, through the metric in batches."""
    metric = CaptionScores()
    for start in range(0, len(pictures), 3):
        metric.update(*zip(*pictures[start : start + 3], strict=True))
    found = metric.compute()
    theirs = {place: given for place, (_, given) in enumerate(pictures)}
    ours = {place: [own] for place, (own, _) in enumerate(pictures)}
    for n, expected in enumerate(Bleu(4).compute_score(theirs, ours, verbose=0)[0], start=1):
        # It adds 1e-15 to every count of matches; without any we say 0.
        assert found[f"BLEU-{n}"] == pytest.approx(expected, abs=2e-4 if found[f"BLEU-{n}"] == 0 else 1e-5)
    assert found["CIDEr"] == pytest.approx(Cider().compute_score(theirs, ours)[0], abs=1e-9)
    best = [max(rouge_l(own.split(), other.split()) for other in given) for own, given in pictures]
    assert found["ROUGE-L"] == pytest.approx(sum(best) / len(best), abs=1e-6)
    assert list(found) == ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]


def test_a_copy_is_perfect_and_case_and_punctuation_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a socket: nothing is downloaded."""
    monkeypatch.setattr(socket, "socket", None)
    captions = ["A red cat, on the mat!", "Two dogs run in a park."]
    references = [["a red cat on the mat", "something else altogether"], ["TWO DOGS run in a park"]]
    found = caption_scores(captions, references)
    assert found.pop("CIDEr") > 7
    assert found == pytest.approx({"BLEU-1": 1, "BLEU-2": 1, "BLEU-3": 1, "BLEU-4": 1, "ROUGE-L": 1})
    nothing = caption_scores(["", "?!"], references)
    assert nothing == dict.fromkeys(nothing, 0)


def test_words() -> None:
    """Lower case, whole words, no punctuation."""
    assert words_of("A man's t-shirt -- 'Très chic', 2 of 3!") == "a man's t-shirt très chic 2 of 3".split()


def test_refuses_what_has_no_score() -> None:
    """Nothing to score, no reference, a text for a list of them, lists that differ."""
    with pytest.raises(BadInputError, match="no captions"):
        caption_scores([], [])
    with pytest.raises(BadInputError, match="sample 0: no reference"):
        caption_scores(["a"], [[]])
    with pytest.raises(BadInputError, match=r"sample 0: .*one text"):
        caption_scores(["a"], ["a cat"])
    with pytest.raises(BadInputError, match=r"sample 0: .*one text"):
        CaptionScores().update(["a"], ["a cat"])
    with pytest.raises(BadInputError, match="1 captions, 0 references"):
        CaptionScores().update(["a"], [])
