"""Prefixes against a loop over rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyses.prefixes import PAD, Prefixes
from hooked_mm.errors import BadInputError


@given(n=st.integers(1, 40), samples=st.integers(1, 4), longest=st.integers(1, 8), seed=st.integers(0, 2**31 - 1))
def test_what_stands_before_a_row(n: int, samples: int, longest: int, seed: int) -> None:
    """Tokens of its own sample at earlier positions, the last so many, whatever the order of rows."""
    rng = np.random.default_rng(seed)
    own, positions = rng.integers(samples, size=n), rng.permutation(n)
    words = [None if one == 5 else f"w{one}" for one in rng.integers(6, size=n)]
    words[0] = "w0"
    known = rng.random(samples) < 0.7
    made = Prefixes.of(words, own, positions, known, longest)
    seen = {word for word, sample in zip(words, own, strict=True) if word and known[sample]}
    cut = 0
    batch = made.batch(np.arange(n))
    for row in range(n):
        before = [i for i in np.argsort(positions) if own[i] == own[row] and positions[i] < positions[row] and words[i]]
        cut += len(before) > longest
        expected = [words[i] if words[i] in seen else "" for i in before][-longest:]
        told = [made.names[token] for token in batch[row].tolist() if token != PAD]
        assert told == expected
        assert made.lengths()[row] == len(expected)
    assert made.cut == cut
    assert set(made.names) == {"", *seen}


def test_prefixes_that_are_all_the_same() -> None:
    """A template before every picture is nothing to remember; one other token is, or one less."""
    words = ["<s>", "user", None, None, "<s>", "user", None, None, "<s>", "you", None, "<s>", None]
    samples = np.array([0] * 4 + [1] * 4 + [2] * 3 + [3] * 2)
    positions = np.concatenate([np.arange(4), np.arange(4), np.arange(3), np.arange(2)])
    made = Prefixes.of(words, samples, positions, np.ones(4, bool))
    same = np.array([2, 3, 6, 7])
    for size in (1, 2, 99):
        assert not made.differ(same, size)
        assert made.differ(np.append(same, 10), size)
        assert made.differ(np.append(same, 12), size)
    assert not made.differ(same[:0])


def test_what_is_refused() -> None:
    """Rows without tokens, and rows that stand at one place."""
    ones = np.zeros(2, dtype=int)
    with pytest.raises(BadInputError, match=r"0 rows have tokens.*--selector\.tokens true"):
        Prefixes.of([None, None], ones, np.arange(2), np.ones(1, bool))
    with pytest.raises(BadInputError, match="position 0 of a sample is there twice"):
        Prefixes.of(["a", "b"], ones, ones, np.ones(1, bool))
