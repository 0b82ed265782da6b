"""Tables of what was said, against counting by hand and by another library."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from steering.answer_tables import accuracy_by_type, answer_changes, transitions_of
from steering.steered_answers import Answers

WORDS = ("red", "blue", "yes", "no", "none")
KINDS = ("colour", "presence")


def made(samples: list[tuple[str, str, str, str]]) -> Answers:
    """Of (type, right answer, before, after) each."""
    rows = [{"sample": str(n), "question_type": kind, "answer": right} for n, (kind, right, _, _) in enumerate(samples)]
    return Answers(rows, [[one[2] for one in samples], [one[3] for one in samples]])


SAMPLES = st.lists(
    st.tuples(st.sampled_from(KINDS), *(st.sampled_from(WORDS) for _ in range(3))), min_size=1, max_size=30
)


@given(samples=SAMPLES)
def test_accuracy_is_that_of_samples(samples: list[tuple[str, str, str, str]]) -> None:
    """Per type and over all samples, as scikit-learn counts; the overall is no mean of types."""
    rows = accuracy_by_type(made(samples), [0, 7], "question_type")
    by_type = defaultdict(list, {"overall": samples})
    for sample in samples:
        by_type[sample[0]].append(sample)
    assert {(row["setting"], row["type"]) for row in rows} == {(n, kind) for n in (0, 7) for kind in by_type}
    for row in rows:
        own = by_type[row["type"]]
        said = [one[2 if row["setting"] == 0 else 3] for one in own]
        right, before = [one[1] for one in own], [one[2] for one in own]
        assert row["samples"] == len(own)
        assert row["accuracy"] == pytest.approx(accuracy_score(right, said))
        assert row["fall"] == pytest.approx(accuracy_score(right, before) - accuracy_score(right, said))
        assert row["changed"] == pytest.approx(1 - accuracy_score(before, said))


@given(samples=SAMPLES)
def test_counts_and_transitions_add_up(samples: list[tuple[str, str, str, str]]) -> None:
    """Every change of a count is what came less what went; whole answers are counted, so that `none` is no `no`."""
    answers = made(samples)
    changes = {row["answer"]: row for row in answer_changes(answers, [0, 7]) if row["setting"] == 7}
    assert {name: row["after"] for name, row in changes.items() if row["after"]} == Counter(one[3] for one in samples)
    assert {name: row["before"] for name, row in changes.items() if row["before"]} == Counter(one[2] for one in samples)
    moved = transitions_of(answers, [0, 7])
    assert all(row["setting"] == 7 and row["before"] != row["after"] for row in moved)
    for name, row in changes.items():
        came, went = (sum(m["samples"] for m in moved if m[end] == name) for end in ("after", "before"))
        assert row["change"] == came - went == row["after"] - row["before"]
    assert [row["samples"] for row in moved] == sorted((row["samples"] for row in moved), reverse=True)


def test_ten_answers_are_scored_as_vqav2_does_and_unknown_ones_left_out() -> None:
    """Three of ten who say so are enough; a sample without any answer is no sample of the table."""
    rows = [
        {"sample": "a", "question_type": "other", "answer": "red", "answers": ["red"] * 3 + ["blue"] * 7},
        {"sample": "b", "question_type": "other", "answer": None},
    ]
    (other, overall) = accuracy_by_type(Answers(rows, [["red", "red"]]), [0], "question_type")[::-1]
    assert other["samples"] == overall["samples"] == 1
    # Leave-one-out: of the ten subsets three lack a "red" (2/3 each), seven have three of them.
    assert other["accuracy"] == pytest.approx((3 * 2 / 3 + 7) / 10)
