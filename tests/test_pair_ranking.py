"""Pairs of concepts are ranked by what they do to planted answers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from hooked_mm.errors import BadInputError
from steering.pair_ranking import changes, rank_pairs, real_targets

BEFORE = ["red"] * 10 + ["blue"] * 5 + ["yes"] * 20
WORDS = st.sampled_from(["red", "blue", "green", "yes", "no", None])


def test_planted_order() -> None:
    """A clean vector before one that moves as much with damage, before one that moves little, before none; a vector
    that moves answers away from each other comes with several targets."""
    after = {
        "nothing": BEFORE,
        "little": ["blue"] * 3 + BEFORE[3:],
        "with damage": ["blue"] * 15 + ["no"] * 9 + ["yes"] * 11,
        "clean": ["blue"] * 15 + ["yes"] * 20,
        "two ways": ["blue"] * 5 + ["green"] * 5 + BEFORE[10:],
    }
    ranks = rank_pairs(BEFORE, after)
    assert [rank.pair for rank in ranks] == ["clean", "with damage", "little", "two ways", "nothing"]
    clean, damage, little, two, nothing = ranks
    assert (clean.target, clean.gained, clean.clean, clean.score, clean.changed) == ("blue", 10, 1.0, 10.0, 10)
    assert (damage.gained, damage.clean) == (10, 10 / 19)
    assert (little.gained, little.clean) == (3, 1.0)
    assert (two.gained, two.clean, two.targets) == (5, 0.5, ("blue", "green"))
    assert (nothing.target, nothing.gained, nothing.clean, nothing.score, nothing.changed) == (None, 0, 0.0, 0.0, 0)


def test_other_answers_that_become_the_target_are_damage() -> None:
    """When the source is told: all to blue, or the reds alone."""
    after = {"all": ["blue"] * 35, "reds": ["blue"] * 15 + BEFORE[15:]}
    assert [rank.pair for rank in rank_pairs(BEFORE, after)] == ["all", "reds"]
    ranks = {rank.pair: rank for rank in rank_pairs(BEFORE, after, source="red")}
    assert ranks["reds"].clean == 1
    assert ranks["all"].clean == pytest.approx(10 / 30)
    assert rank_pairs(BEFORE, after, source=["red"])[0].pair == "reds"


def test_a_target_that_is_asked_for() -> None:
    """Its gain counts, also where another answer gains more, and where it loses."""
    after = {"p": ["blue"] * 4 + ["green"] * 6 + BEFORE[10:], "q": BEFORE[:10] + ["red"] * 5 + BEFORE[15:]}
    ranks = {rank.pair: rank for rank in rank_pairs(BEFORE, after, target="blue")}
    assert (ranks["p"].target, ranks["p"].gained, ranks["p"].clean) == ("blue", 4, 0.4)
    assert (ranks["q"].gained, ranks["q"].clean, ranks["q"].score) == (-5, 0, 0)


def test_xl_vlms_fault_counts_by_substring() -> None:
    """ "no" is not in "snow", "one" not in "none", "red" not in "bored": whole answers count."""
    before = ["yes", "yes", "two", "blue"]
    after = ["snow", "no", "none", "bored"]
    assert sum("no" in answer for answer in after) == 3
    assert changes(before, after)["no"] == 1
    (rank,) = rank_pairs(before, {"p": after}, target="one")
    assert rank.gained == 0
    assert rank_pairs(before, {"p": after}, target="red")[0].gained == 0


def test_case_and_space_do_not_count() -> None:
    """ "Red " and "red" are one answer."""
    assert changes(["red", "BLUE"], [" Red", "blue "]) == {}


def test_ties_and_what_is_missing() -> None:
    """Equal pairs stay in the order given, equal targets go by name; NaN and None are no answer, and no target."""
    after = {name: ["blue", "green"] for name in "cab"}
    ranks = rank_pairs(["red", "red"], after)
    assert [rank.pair for rank in ranks] == ["c", "a", "b"]
    assert {rank.target for rank in ranks} == {"blue"}
    gone = [None, float("nan")]
    (rank,) = rank_pairs(["red", "red"], {0: gone})  # type: ignore[dict-item]
    assert (rank.target, rank.changed, rank.targets) == (None, 2, ())
    (rank,) = rank_pairs(gone, {0: ["red", None]})  # type: ignore[arg-type]
    assert (rank.target, rank.gained, rank.clean) == ("red", 1, 1.0)
    assert rank_pairs(["red"], {}) == []


def test_really_targets() -> None:
    """One far above the rest is one target; two alike far above are two; losses never count; only the top five do."""
    assert real_targets({"blue": 90, "green": 3, "black": 2, "red": -95}) == ["blue"]
    assert real_targets({"blue": 50, "green": 48, "black": 2}) == ["blue", "green"]
    assert real_targets({"b": 4, "a": 4}) == ["a", "b"]
    assert real_targets({"red": -3}) == real_targets({}) == []
    assert len(real_targets({str(n): 7 for n in range(9)})) == 5


@given(st.lists(st.integers(1, 60), min_size=2, max_size=5, unique=True))
def test_two_means_against_scikit_learn(gains: list[int]) -> None:
    """The upper cluster of scikit-learn's two means is never a better cut."""
    change = {f"a{n}": gain for n, gain in enumerate(gains)}
    found = real_targets(change)
    values = np.array(sorted(gains, reverse=True), float)
    fitted = KMeans(2, n_init=20, random_state=0).fit(values[:, None])
    upper, lower = values[: len(found)], values[len(found) :]
    ours = ((upper - upper.mean()) ** 2).sum() + ((lower - lower.mean()) ** 2).sum()
    assert ours <= fitted.inertia_ + 1e-9
    assert {change[name] for name in found} == set(upper)


@given(data=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=30))
def test_gains_are_counts(data: list[tuple[str | None, str | None]]) -> None:
    """By counting with a Counter; the score is at most what was gained and the clean share is a share."""
    before, after = [one for one, _ in data], [other for _, other in data]
    (rank,) = rank_pairs(before, {"p": after})
    if rank.target is not None:
        assert rank.gained == Counter(after)[rank.target] - Counter(before)[rank.target] > 0
    assert 0 <= rank.clean <= 1
    assert rank.score == pytest.approx(rank.gained * rank.clean)
    assert rank.changed == sum(one != other for one, other in data)


def test_refusals() -> None:
    """Answers of other samples, no samples, no changes to look at."""
    with pytest.raises(BadInputError, match="2 answers before and 1 after"):
        rank_pairs(["a", "b"], {"p": ["a"]})
    with pytest.raises(BadInputError, match="no answers"):
        rank_pairs([], {"p": []})
    with pytest.raises(BadInputError, match="top=0"):
        real_targets({"a": 1}, top=0)
