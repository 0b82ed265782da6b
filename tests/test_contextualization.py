"""Ethayarajh's measures against loops over pairs, SVDs and weighted bootstraps by hand; the rivals' faults by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analyses import contextualization as module
from analyses.contextualization import (
    contextualization,
    explained_by_first,
    intra_similarity,
    mean_cosine,
    measure,
    plan,
)
from hooked_mm.errors import BadInputError

SEEDS = st.integers(0, 2**31 - 1)


def pair_by_pair(rows: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean cosine over pairs of different rows, in a double loop; a row that weighs w makes no pair with itself."""
    weight = np.ones(len(rows)) if weights is None else weights
    above = below = 0.0
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            if i != j:
                cosine = one @ other / np.sqrt((one @ one) * (other @ other))
                above, below = above + weight[i] * weight[j] * cosine, below + weight[i] * weight[j]
    return above / below


def first_share(rows: np.ndarray, weights: np.ndarray | None = None) -> float:
    """s_1^2 / sum s^2 by a singular value decomposition of rows that count as often as they weigh."""
    weight = np.ones(len(rows)) if weights is None else weights
    sizes = np.linalg.svd(rows * np.sqrt(weight)[:, None], compute_uv=False) ** 2
    return sizes[0] / sizes.sum()


def text(n_words: int = 6, n_sentences: int = 30, length: int = 8, d: int = 7, seed: int = 0) -> tuple[Any, ...]:
    """Rows that are a word's vector, plus its sentence's, plus a common one, plus noise."""
    rng = np.random.default_rng(seed)
    words = rng.integers(n_words, size=n_sentences * length)
    sentences = np.repeat(np.arange(n_sentences), length)
    parts = rng.standard_normal((n_words, d))[words] + rng.standard_normal((n_sentences, d))[sentences] + 0.5
    return torch.tensor(parts + rng.standard_normal(parts.shape)), words, sentences


@given(n=st.integers(2, 20), d=st.integers(1, 12), seed=SEEDS, dtype=st.sampled_from([torch.float64, torch.bfloat16]))
def test_closed_forms_are_the_loops(n: int, d: int, seed: int, dtype: torch.dtype) -> None:
    """Pairwise cosines, cosines to the mean and the first singular value, for more rows than columns and for fewer."""
    rows = (torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 0.3).to(dtype)
    hand = rows.double().numpy()
    assert mean_cosine(rows).value == pytest.approx(pair_by_pair(hand), abs=1e-12)
    assert explained_by_first(rows).value == pytest.approx(first_share(hand), abs=1e-12)
    mean = hand.mean(0)
    to_mean = [row @ mean / (np.linalg.norm(row) * np.linalg.norm(mean)) for row in hand]
    assert intra_similarity(rows) == pytest.approx(np.mean(to_mean), abs=1e-12)


@given(n=st.integers(3, 12), d=st.integers(2, 15), seed=SEEDS)
def test_slopes_are_derivatives_by_weights(n: int, d: int, seed: int) -> None:
    """Against finite differences of the weighted loops; they sum to nothing, since no measure depends on the scale."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    for ours, hand in ((mean_cosine, pair_by_pair), (explained_by_first, first_share)):
        slopes, step = ours(rows).slopes, 1e-5
        for row in range(n):
            up, down = np.ones(n), np.ones(n)
            up[row], down[row] = 1 + step, 1 - step
            expected = (hand(rows.numpy(), up) - hand(rows.numpy(), down)) / (2 * step)
            assert float(slopes[row]) == pytest.approx(expected, abs=1e-6)
        assert float(slopes.sum()) == pytest.approx(0, abs=1e-10)


def test_a_vector_is_not_counted_against_itself() -> None:
    """Orthogonal occurrences have self-similarity 0; with the diagonal it would be 1 / n."""
    assert mean_cosine(torch.eye(4)).value == pytest.approx(0, abs=1e-15)


def test_explained_variance_is_not_centred() -> None:
    """Occurrences around one vector are explained by it; centred, nothing but noise would be left."""
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 20
    centred = first_share((rows - rows.mean(0)).double().numpy())
    assert centred < 0.4 < 0.99 < explained_by_first(rows).value


def test_the_baseline_of_explained_variance_is_of_the_same_size() -> None:
    """Of pure noise nothing is left above it, for frequent words and rare ones; a large sample's would leave much."""
    rng = np.random.default_rng(0)
    words = np.concatenate([np.repeat(np.arange(40), 5), np.repeat([40, 41], 200)])
    values = torch.tensor(rng.standard_normal((len(words), 16)))
    found = contextualization(values, words, np.arange(len(words)), repeats=20)
    rare, frequent = found.explained.each[:40].mean(), found.explained.each[40:].mean()
    assert abs(float(rare)) < 0.02
    assert abs(float(frequent)) < 0.02
    assert float(found.raw_explained.each[:40].mean()) - first_share(values.numpy()) > 0.2


def test_random_occurrences_are_one_per_sentence() -> None:
    """Sentences of like tokens are no reason to call random tokens alike."""
    values = torch.eye(8, dtype=torch.float64).repeat_interleave(5, 0)
    sentences = np.repeat(np.arange(8), 5)
    found = contextualization(values, np.zeros(40, dtype=int), sentences)
    assert found.baseline_cosine.value == pytest.approx(0, abs=1e-15)
    assert found.intra_similarity.value == pytest.approx(1)
    # Any 40 pairs: 4 of 39 partners are of one's own sentence.
    assert found.raw_self_similarity.value == pytest.approx(4 / 39)
    for rows in plan(np.zeros(40, dtype=int), sentences).pairs:
        assert sorted(sentences[rows]) == list(range(8))


def test_the_baseline_has_the_size_that_is_asked_for() -> None:
    """So many rows, or as many as there are sentences, and that is counted."""
    words, sentences = np.zeros(60, dtype=int), np.repeat(np.arange(30), 2)
    few, all_of_them = (plan(words, sentences, baseline=size) for size in (12, 1000))
    assert ({len(rows) for rows in few.pairs}, few.counts["baseline"]) == ({12}, 12)
    assert ({len(rows) for rows in all_of_them.pairs}, all_of_them.counts["baseline"]) == ({30}, 30)


def test_repeated_rows_are_left_out_and_counted() -> None:
    """A beginning-of-sequence token is one occurrence however many samples it opens; among the rest it would be in
    every baseline and make its word the most similar of all."""
    values, words, sentences = text()
    opening = torch.full((30, 7), 9.0, dtype=torch.float64)
    more = torch.cat([values, opening]), np.append(words, np.full(30, 6)), np.append(sentences, np.arange(30))
    firsts = np.append(np.arange(240), np.full(30, 240))
    clean, dirty = contextualization(*more, firsts), contextualization(*more)
    expected = contextualization(values, words, sentences)
    assert clean.words == expected.words == list(range(6))
    torch.testing.assert_close(clean.raw_self_similarity.each, expected.raw_self_similarity.each)
    assert dirty.words == list(range(7))
    assert float(dirty.raw_self_similarity.each[6]) == pytest.approx(1)
    assert dirty.baseline_cosine.value > clean.baseline_cosine.value + 0.02
    assert plan(*more[1:], firsts).counts["repeated_contexts"] == 29


def test_padding_rows_are_zero_and_left_out() -> None:
    """Rows of norm zero have no cosine; nothing becomes NaN, they are counted, and the rest is as without them."""
    values, words, sentences = text()
    more = (
        torch.cat([values, values.new_zeros(60, 7)]),
        np.append(words, np.full(60, -1)),
        np.append(sentences, np.tile(np.arange(30), 2)),
    )
    found, expected = contextualization(*more), contextualization(values, words, sentences)
    assert 60 <= found.zeros <= 60
    torch.testing.assert_close(found.raw_intra_similarity.each, expected.raw_intra_similarity.each)
    torch.testing.assert_close(found.raw_explained.each, expected.raw_explained.each)
    nothing = contextualization(torch.zeros(20, 3), np.repeat([0, 1], 10), np.tile(np.arange(10), 2))
    assert nothing.zeros == 20
    assert nothing.raw_self_similarity.each.isnan().all()


def test_every_word_and_sentence_by_hand() -> None:
    """Each value is that of its own rows; in blocks of a few rows too, and through a reader."""
    values, words, sentences = text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HELD", 100)
        found = measure(lambda rows: values[torch.from_numpy(rows)].float(), plan(words, sentences))
    hand = values.float().double().numpy()
    for index, word in enumerate(found.words):
        own = hand[words == word]
        assert float(found.raw_self_similarity.each[index]) == pytest.approx(pair_by_pair(own), abs=1e-12)
        assert float(found.raw_explained.each[index]) == pytest.approx(first_share(own), abs=1e-12)
    for index, sentence in enumerate(found.sentences):
        own = hand[sentences == sentence]
        cosines = own @ own.mean(0) / np.linalg.norm(own, axis=1) / np.linalg.norm(own.mean(0))
        assert float(found.raw_intra_similarity.each[index]) == pytest.approx(cosines.mean(), abs=1e-12)
    assert found.self_similarity.value == pytest.approx(
        float(found.raw_self_similarity.each.mean()) - found.baseline_cosine.value
    )


def test_more_draws_than_words_are_still_one_baseline() -> None:
    """Five draws and five words are not paired off with each other."""
    values, words, sentences = text(n_words=5)
    found = contextualization(values, words, sentences, repeats=5)
    spread = found.raw_self_similarity.each - found.self_similarity.each
    torch.testing.assert_close(spread, torch.full_like(spread, found.baseline_cosine.value))


def test_pseudo_values_give_the_bootstrap_by_sentence() -> None:
    """Their mean is the measure, and their spread that of measures of sentences drawn anew, computed in full."""
    values, words, sentences = text(n_sentences=60, seed=3)
    found = contextualization(values, words, sentences)
    rng, hand = np.random.default_rng(0), values.numpy()
    drawn: dict[str, list[float]] = {"self": [], "explained": [], "intra": []}
    for _ in range(300):
        times = np.bincount(rng.integers(60, size=60), minlength=60)
        weight = times[sentences].astype(float)
        units = hand / np.linalg.norm(hand, axis=1, keepdims=True)
        alike, explained = [], []
        for word in range(6):
            own, w = units[words == word], weight[words == word]
            total = (w[:, None] * own).sum(0)
            alike.append((total @ total - (w**2).sum()) / (w.sum() ** 2 - (w**2).sum()))
            explained.append(first_share(hand[words == word], w))
        drawn["self"].append(float(np.mean(alike)))
        drawn["explained"].append(float(np.mean(explained)))
        drawn["intra"].append(float((times * found.raw_intra_similarity.each.numpy()).sum() / 60))
    for name, estimate in (
        ("self", found.raw_self_similarity),
        ("explained", found.raw_explained),
        ("intra", found.raw_intra_similarity),
    ):
        pseudo = estimate.pseudo()
        assert float(pseudo.mean()) == pytest.approx(estimate.value, abs=1e-12)
        means = pseudo.numpy()[rng.integers(60, size=(2000, 60))].mean(1)
        assert means.std() == pytest.approx(np.std(drawn[name]), rel=0.2)


def test_the_same_words_in_all_sentences_are_static() -> None:
    """What holds nothing of its context: self-similarity and explained variance are 1 less their baselines."""
    words, sentences = np.tile(np.arange(4), 10), np.repeat(np.arange(10), 4)
    found = contextualization(torch.eye(4)[torch.from_numpy(words)], words, sentences)
    assert found.raw_self_similarity.each.tolist() == pytest.approx([1.0] * 4)
    assert found.raw_explained.each.tolist() == pytest.approx([1.0] * 4)
    assert found.raw_intra_similarity.each.tolist() == pytest.approx([0.5] * 10)


def test_what_is_left_out_is_counted() -> None:
    """Rare words, rows without a word, sentences of one token, occurrences above the most."""
    words = np.array([0] * 12 + [1] * 3 + [-1] * 2)
    sentences = np.array([*range(12), 0, 1, 2, 3, 99])
    made = plan(words, sentences, most=10)
    assert made.counts == {
        "repeated_contexts": 0,
        "rows_without_word": 2,
        "words": 1,
        "words_too_rare": 1,
        "occurrences_above_most": 2,
        "sentences": 13,
        "sentences_of_one_token": 9,
        "baseline": 13,
    }
    assert [len(rows) for rows in made.words.values()] == [10]
    assert sorted(made.sentences) == [0, 1, 2, 3]


def test_the_same_seed_gives_the_same_numbers() -> None:
    """And another one another baseline."""
    data = text()
    one, again, other = (contextualization(*data, seed=seed, baseline=10).baseline_cosine.value for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(
    ("words", "sentences", "settings", "message"),
    [
        ([0, 0], [0, 0], {}, "1 sentences; the baseline takes each occurrence from another"),
        ([0], [0, 1], {}, "1 words, 2 sentences"),
        ([0, 0], [0, 1], {"least": 1}, "least=1.*cosines need two rows"),
        ([0, 0], [0, 1], {"least": 9, "most": 8}, "most can't be below least"),
    ],
)
def test_what_is_refused(words: list[int], sentences: list[int], settings: dict[str, int], message: str) -> None:
    """With the reason."""
    with pytest.raises(BadInputError, match=message):
        plan(np.array(words), np.array(sentences), **settings)


def test_rows_that_are_not_finite_are_refused() -> None:
    """By their number."""
    values, words, sentences = text()
    values[17, 2] = float("inf")
    with pytest.raises(BadInputError, match="row 17 of the representations is not finite"):
        contextualization(values, words, sentences)
