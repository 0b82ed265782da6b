"""Top tokens against counting by hand, over any cut of the data."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analyses.top_tokens import TokenCount, TopTokens, class_tokens, markdown, shares_by_sample, spelling
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.word_classes import words_of


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 9))
def test_counts_are_those_of_a_counter_however_the_rows_are_cut(seed: int, rows: int, size: int) -> None:
    """Shares of rows, mean probabilities where the token is among the k, the most frequent first."""
    generator = torch.Generator().manual_seed(seed)
    best = torch.rand(rows, 12, generator=generator).softmax(1).topk(3)
    ours = TopTokens(12)
    for ids, values in zip(best.indices.split(size), best.values.split(size), strict=True):
        ours.add(ids, values)
    times: Counter[int] = Counter()
    sums: defaultdict[int, float] = defaultdict(float)
    for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        times.update(ids)
        for token, value in zip(ids, values, strict=True):
            sums[token] += value
    found = ours.best(5, "image", 2)
    expected = sorted(times, key=lambda token: (-times[token], -sums[token]))[:5]
    assert [item.token for item in found] == expected
    for item in found:
        assert (item.modality, item.layer, item.count) == ("image", 2, times[item.token])
        assert item.share == pytest.approx(times[item.token] / rows)
        assert item.probability == pytest.approx(sums[item.token] / times[item.token])


def test_tokens_that_are_never_said_are_not_listed_and_none_is_invented() -> None:
    """Also of no rows at all."""
    assert TopTokens(5).best(3) == []
    ours = TopTokens(5)
    ours.add(torch.tensor([[4]]), torch.tensor([[0.5]]))
    assert ours.best(3) == [TokenCount("all", 0, 4, 1, 1.0, 0.5)]


def test_what_can_not_be_counted_is_refused() -> None:
    """Shapes that differ, tokens of another vocabulary."""
    with pytest.raises(BadInputError, match=r"must be \(n, k\)"):
        TopTokens(5).add(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 2))
    with pytest.raises(BadInputError, match="tokens 0 to 5 are not of a vocabulary of 5"):
        TopTokens(5).add(torch.tensor([[0, 5]]), torch.zeros(1, 2))


def test_the_tokens_of_a_class_spell_its_words(llava: HookedMM) -> None:
    """In any case; those that the tokenizer lacks have none, and a class without any is refused."""
    tokenizer = llava.tokenizer
    found = class_tokens(tokenizer, words_of("colours"), 72)
    spelt = sorted(tokenizer.decode([token]) for token in found.nonzero()[:, 0].tolist())
    assert spelt == ["black", "blue", "green", "orange", "purple", "red", "white", "yellow"]
    assert torch.equal(class_tokens(tokenizer, ["RED"], 72), class_tokens(tokenizer, ["red"], 72))
    with pytest.raises(BadInputError, match="no token of this tokenizer spells any of"):
        class_tokens(tokenizer, ["zebra", "top left"], 72)


def test_shares_are_counted_by_sample() -> None:
    """Samples without a row have none."""
    hits = torch.tensor([True, False, True, True])
    inside, rows = shares_by_sample(hits, torch.tensor([0, 0, 2, 2]), 4)
    assert inside.tolist() == [1, 0, 2, 0]
    assert rows.tolist() == [2, 0, 2, 0]


def test_tables_hold_any_token_as_text(llava: HookedMM) -> None:
    """Bars, ticks and marks up end no cell."""

    class Odd:
        words = ("red", "a|b", "<b>`x`", "  ")

        def decode(self, ids: list[int]) -> str:
            return self.words[ids[0]]

        def convert_ids_to_tokens(self, token: int) -> str:
            return "Ġ"

    assert [spelling(Odd(), token) for token in range(4)] == ["red", "`a\\|b`", "`<b>'x'`", "Ġ"]
    found = [TokenCount("text", 0, 0, 5, 0.5, 0.1), TokenCount("image", 1, 1, 5, 0.25, 0.1)]
    assert markdown(found, Odd()).splitlines() == [
        "| layer | text | image |",
        "| --- | --- | --- |",
        "| 0 | red 50 |  |",
        "| 1 |  | `a\\|b` 25 |",
    ]
