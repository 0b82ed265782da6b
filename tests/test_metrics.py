"""Scores against facts: scikit-learn's ROC AUC, planted facts, and what chance gives."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from concept_dict.metrics import (
    auroc,
    by_attribute,
    fact_table,
    match_concepts,
    match_facts,
    naming,
    poles,
    pool_samples,
    random_concepts,
)
from hooked_mm.errors import BadInputError

SEEDS = st.integers(0, 2**31 - 1)


@given(
    n=st.integers(2, 50),
    k=st.integers(1, 4),
    levels=st.sampled_from([1, 2, 5, 50_000]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    seed=SEEDS,
)
def test_auroc_equals_scikit_learn(n: int, k: int, levels: int, dtype: type, seed: int) -> None:
    """Every score column against every fact, with few or many ties; NaN where a fact holds for all or none."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (n, k)).astype(dtype)
    truth = rng.random((n, 5)) < np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    found = auroc(scores, truth)
    assert found.shape == (k, 5)
    for column in range(k):
        for fact in range(5):
            if truth[:, fact].all() or not truth[:, fact].any():
                assert np.isnan(found[column, fact])
            else:
                expected = roc_auc_score(truth[:, fact], scores[:, column])
                assert found[column, fact] == pytest.approx(expected, abs=1e-12)


def test_auroc_does_not_depend_on_order_or_scale() -> None:
    """Any rising function of the scores, and any order of the samples, gives the same; a falling one the rest to 1."""
    rng = np.random.default_rng(0)
    scores, truth = rng.standard_normal((60, 3)), rng.random((60, 4)) < 0.4
    order = rng.permutation(60)
    found = auroc(scores, truth)
    np.testing.assert_allclose(auroc(np.exp(3 * scores)[order], truth[order]), found, atol=1e-12)
    np.testing.assert_allclose(auroc(-scores, truth), 1 - found, atol=1e-12)


def test_auroc_of_many_samples_does_not_overflow() -> None:
    """At 200,000 samples, where products of counts exceed 32 bits, a perfect score is still 1."""
    truth = np.arange(200_000)[:, None] >= 100_000
    assert auroc(np.arange(200_000.0)[:, None], truth) == pytest.approx(1.0, abs=1e-9)


def test_scores_and_facts_must_be_of_the_same_samples() -> None:
    """Different lengths are refused, with both."""
    with pytest.raises(BadInputError, match="3 scores for 4 truths"):
        auroc(np.zeros((3, 1)), np.zeros((4, 1), bool))


def test_a_planted_fact_is_found() -> None:
    """Concepts that follow facts are named by them with a held-out AUROC of 1, and shuffled labels give about .5."""
    rng = np.random.default_rng(0)
    truth, held = rng.random((300, 6)) < 0.3, rng.random((250, 6)) < 0.3
    wanted = np.array([4, 0, 2])

    def scores(facts: np.ndarray) -> np.ndarray:
        return facts[:, wanted] * 2.0 + rng.random((len(facts), 3))

    match = match_facts(scores(truth), truth, scores(held), held, shuffles=40)
    np.testing.assert_array_equal(match.fact, wanted)
    np.testing.assert_allclose(match.chosen, 1.0)
    np.testing.assert_allclose(match.held_out, 1.0)
    np.testing.assert_allclose(match.shuffled, 0.5, atol=0.04)


def test_noise_looks_good_where_it_was_chosen_and_not_where_it_was_not() -> None:
    """The best of many facts is well above .5 even for noise; held out it is not, which is why it is held out."""
    rng = np.random.default_rng(1)
    truth, held = rng.random((100, 60)) < 0.3, rng.random((100, 60)) < 0.3
    match = match_facts(rng.random((100, 40)), truth, rng.random((100, 40)), held)
    assert match.chosen.min() > 0.56
    assert match.chosen.mean() > 0.63
    assert match.held_out.mean() == pytest.approx(0.5, abs=0.03)
    assert match.shuffled.mean() == pytest.approx(0.5, abs=0.02)


def test_the_held_out_score_is_that_of_the_chosen_fact() -> None:
    """A concept whose fact changes between the two sets of samples is scored by the fact that was chosen."""
    rng = np.random.default_rng(2)
    truth, held = rng.random((80, 2)) < 0.5, rng.random((80, 2)) < 0.5
    match = match_facts(truth[:, :1].astype(float), truth, held[:, 1:].astype(float), held)
    assert match.fact.tolist() == [0]
    assert match.chosen[0] == 1.0
    assert match.held_out[0] == pytest.approx(roc_auc_score(held[:, 0], held[:, 1]))
    assert match.held_out[0] < 0.75


def test_a_fact_that_one_set_lacks_is_never_chosen() -> None:
    """Only facts that hold and fail in both sets can be chosen, however well another fits."""
    rng = np.random.default_rng(3)
    truth, held = rng.random((80, 3)) < 0.5, rng.random((80, 3)) < 0.5
    held[:, 1] = False
    match = match_facts(truth[:, [1]].astype(float), truth, held[:, [0]].astype(float), held)
    assert match.fact[0] != 1
    assert np.isfinite([match.chosen, match.held_out, match.shuffled]).all()


def test_no_usable_fact_is_refused() -> None:
    """Where no fact can be scored in both sets, the message asks for more samples."""
    truth = np.zeros((10, 2), bool)
    truth[:5, 0] = True
    with pytest.raises(BadInputError, match=r"no fact both holds and fails in each of the two sets.*more samples"):
        match_facts(np.ones((10, 1)), truth, np.ones((10, 1)), truth[:, ::-1])


def test_the_same_seed_shuffles_alike() -> None:
    """The baseline is the same for one seed, and another for another."""
    rng = np.random.default_rng(4)
    parts = (rng.random((40, 5)), rng.random((40, 8)) < 0.5, rng.random((40, 5)), rng.random((40, 8)) < 0.5)
    first, again, other = (match_facts(*parts, seed=seed).shuffled for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@given(n=st.integers(1, 40), k=st.integers(1, 5), count=st.integers(1, 12), seed=SEEDS)
def test_pooling_takes_the_largest_of_each_sample(n: int, k: int, count: int, seed: int) -> None:
    """Per sample and concept the largest activation over its rows, in whatever order they come; 0 without rows."""
    rng = np.random.default_rng(seed)
    activations, samples = rng.random((n, k)).astype(np.float32), rng.integers(0, count, n)
    expected = [activations[samples == s].max(axis=0) if s in samples else np.zeros(k) for s in range(count)]
    np.testing.assert_array_equal(pool_samples(torch.as_tensor(activations), samples, count), expected)


def test_pooling_keeps_negative_activations() -> None:
    """The largest of negative activations, as cosines can be, is negative; only a sample without rows has 0."""
    activations = torch.tensor([[-0.5, 0.2], [-0.1, -0.3]])
    np.testing.assert_allclose(pool_samples(activations, np.array([0, 0]), 2), [[-0.1, 0.2], [0, 0]])


def test_fact_table() -> None:
    """Rows are samples, columns the names in their order; a sample may have no fact."""
    table = fact_table([["b", "a"], [], ["c"], ["a", "a"]], ["a", "b", "c"])
    assert table.dtype == bool
    assert table.tolist() == [[True, True, False], [False] * 3, [False, False, True], [True, False, False]]


@pytest.mark.parametrize("names", [["a"], []])
def test_fact_table_does_not_drop_an_unknown_fact(names: list[str]) -> None:
    """A fact that is not among the names is an error that names it, never a silent gap."""
    with pytest.raises((KeyError, BadInputError), match="colour=mauve"):
        fact_table([["colour=mauve"]], names)


def test_random_concepts() -> None:
    """Unit directions, the same for a seed, spread evenly: mean squared cosine 1 / d, and no mean direction."""
    drawn = random_concepts(400, 50, seed=3)
    assert torch.equal(drawn, random_concepts(400, 50, seed=3))
    assert not torch.equal(drawn, random_concepts(400, 50, seed=4))
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(400))
    cosines = (drawn @ drawn.T)[~torch.eye(400, dtype=torch.bool)]
    assert float((cosines**2).mean()) == pytest.approx(1 / 50, rel=0.05)
    assert float(drawn.mean(dim=0).norm()) < 0.1


def test_the_concept_of_every_fact_is_found() -> None:
    """Facts that a concept follows have it as their best one with AUROC 1; the others have about .5, as chance has."""
    rng = np.random.default_rng(5)
    truth, held = rng.random((400, 5)) < 0.4, rng.random((400, 5)) < 0.4
    wanted = np.array([3, 1])

    def scores(facts: np.ndarray) -> np.ndarray:
        return np.concatenate([rng.random((len(facts), 1)), facts[:, wanted] * 2.0], axis=1)

    found = match_concepts(scores(truth), truth, scores(held), held, shuffles=40)
    assert found.concept[wanted].tolist() == [1, 2]
    np.testing.assert_allclose(found.chosen[wanted], 1.0)
    np.testing.assert_allclose(found.held_out[wanted], 1.0)
    np.testing.assert_allclose(found.held_out[[0, 2, 4]], 0.5, atol=0.1)
    np.testing.assert_allclose(found.shuffled, 0.5, atol=0.03)


@given(n=st.integers(8, 40), k=st.integers(1, 5), f=st.integers(1, 5), seed=SEEDS)
def test_the_concept_is_chosen_on_one_set_and_scored_on_the_other(n: int, k: int, f: int, seed: int) -> None:
    """By scikit-learn, fact by fact; what can't be scored in both sets has no concept and no score."""
    rng = np.random.default_rng(seed)
    scores, held_scores = rng.integers(0, 5, (2, n, k)).astype(float)
    truth, held = rng.random((2, n, f)) < 0.4
    usable = [len(set(side[:, fact])) == 2 for side in (truth, held) for fact in range(f)]
    usable = [usable[fact] and usable[f + fact] for fact in range(f)]
    if not any(usable):
        with pytest.raises(BadInputError, match="no fact both holds and fails"):
            match_concepts(scores, truth, held_scores, held)
        return
    found = match_concepts(scores, truth, held_scores, held, shuffles=2)
    for fact in range(f):
        if not usable[fact]:
            assert found.concept[fact] == -1
            assert np.isnan([found.chosen[fact], found.held_out[fact], found.shuffled[fact]]).all()
            continue
        tried = [roc_auc_score(truth[:, fact], scores[:, concept]) for concept in range(k)]
        assert found.chosen[fact] == pytest.approx(max(tried), abs=1e-12)
        chosen = found.concept[fact]
        assert tried[chosen] == pytest.approx(max(tried), abs=1e-12)
        expected = roc_auc_score(held[:, fact], held_scores[:, chosen])
        assert found.held_out[fact] == pytest.approx(expected, abs=1e-12)


def test_the_best_of_many_noisy_concepts_is_not_good_held_out() -> None:
    """The maximum over concepts looks good where it was taken and is chance elsewhere, as the baseline says."""
    rng = np.random.default_rng(6)
    truth, held = rng.random((100, 30)) < 0.3, rng.random((100, 30)) < 0.3
    found = match_concepts(rng.random((100, 60)), truth, rng.random((100, 60)), held)
    assert found.chosen.min() > 0.56
    assert found.held_out.mean() == pytest.approx(0.5, abs=0.03)
    assert found.shuffled.mean() == pytest.approx(0.5, abs=0.02)


def test_both_ends_of_a_signed_activation_are_scored() -> None:
    """A fact told by the negative end of a component is found there; pooled without poles it would be lost."""
    rng = np.random.default_rng(7)
    truth = rng.random((200, 2)) < 0.3
    # Two rows per sample: the component says the first fact by +1 in one, the second by -1 in the other.
    signed = torch.as_tensor(np.stack([truth[:, 0], -truth[:, 1].astype(float)], axis=1).reshape(-1, 1)).float()
    rows = np.repeat(np.arange(200), 2)
    pooled = pool_samples(poles(signed), rows, 200)
    found = match_concepts(pooled, truth, pooled, truth)
    assert found.concept.tolist() == [0, 1]
    np.testing.assert_allclose(found.held_out, 1.0)
    assert match_concepts(pool_samples(signed, rows, 200), truth, pooled[:, :1], truth).chosen[1] < 0.6
    torch.testing.assert_close(poles(torch.tensor([[2.0, -3.0]])), torch.tensor([[2.0, 0.0, 0.0, 3.0]]))


def test_by_attribute() -> None:
    """Means per what stands before the equals sign, NaN left out; a fact without one is its own attribute."""
    facts = ["colour=red", "colour=blue", "shape=ring", "day", "colour=a=b"]
    found = by_attribute(facts, np.array([1.0, 0.5, np.nan, 0.25, 0.0]))
    assert list(found) == ["colour", "shape", "day"]
    assert found["colour"] == 0.5
    assert np.isnan(found["shape"])
    assert found["day"] == 0.25
    with pytest.raises(BadInputError, match="5 facts for 2 values"):
        by_attribute(facts, np.zeros(2))


def test_naming() -> None:
    """The first word only, whole words only, any case; any word of a value; without words nothing is named."""
    words = [["Red", "ring"], ["ring", "red"], ["snow"], [], ["left", "top"], ["cat"]]
    facts = ["colour=red", "colour=red", "answer=no", "colour=red", "position=top left", "animal=cattle"]
    found = naming(words, facts)
    assert found.named.tolist() == [True, False, False, False, True, False]
    assert found.share == pytest.approx(2 / 6)
    with pytest.raises(BadInputError, match="6 lists of words for 5 facts"):
        naming(words, facts[:5])


def test_xl_vlms_fault_substring_matching() -> None:
    """A word names a value as a whole: neither "no" in "snow" nor "cattle" for "cat", nor the attribute's own name."""
    assert not naming([["no"], ["cattle"], ["colour"]], ["place=snow", "animal=cat", "colour=red"]).named.any()


def test_the_chance_of_naming_is_the_mean_over_all_permutations() -> None:
    """Exact, against every way to deal the words out."""
    words, facts = [["red"], ["blue"], ["red"]], ["colour=red", "colour=blue", "colour=green"]
    shares = [naming([words[i] for i in order], facts).share for order in permutations(range(3))]
    found = naming(words, facts)
    assert found.chance == pytest.approx(np.mean(shares))
    assert found.share == pytest.approx(2 / 3)
