"""Probes against scikit-learn's RidgeClassifier, planted labels, and control tasks whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from analyses import linear_probe as module
from analyses.linear_probe import PENALTIES, control_labels, fit, linear_probe, shuffled_labels
from analyses.splits import deal_out, joined
from hooked_mm.errors import BadInputError

SEEDS = st.integers(0, 2**31 - 1)


def planted(n_samples: int = 120, rows: int = 5, d: int = 20, noise: float = 0.3, seed: int = 0) -> dict[str, Any]:
    """Rows that hold their sample's label (one of three) and their type (one of five) along axes of their own."""
    rng = np.random.default_rng(seed)
    samples = np.repeat(np.arange(n_samples), rows)
    labels = rng.integers(3, size=n_samples)[samples]
    types = np.tile(np.arange(rows), n_samples)
    values = noise * rng.standard_normal((len(samples), d)) + 4
    values[np.arange(len(samples)), labels] += 1
    values[np.arange(len(samples)), 3 + types] += 1
    values[:, -1] = 2.5
    return {"values": torch.tensor(values), "labels": labels, "types": types, "samples": samples}


def probed(data: dict[str, Any], labels: np.ndarray | None = None, **options: Any) -> Any:
    """The probe on planted rows."""
    samples = data["samples"]
    parts = deal_out(np.arange(samples.max() + 1))
    chosen = data["labels"] if labels is None else labels
    return linear_probe(lambda rows: data["values"][rows], chosen, data["types"], samples, parts, **options)


@given(
    n=st.integers(8, 60),
    d=st.integers(1, 70),
    classes=st.integers(2, 5),
    penalty=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=SEEDS,
)
def test_predictions_are_those_of_scikit_learn(n: int, d: int, classes: int, penalty: float, seed: int) -> None:
    """RidgeClassifier behind a StandardScaler, for more rows than columns and for fewer, read in chunks of a few."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((3 * n, d)) * rng.uniform(0.1, 9, d) + rng.uniform(-20, 20, d)
    labels = rng.integers(classes, size=3 * n)
    labels[: classes * 2] = np.arange(classes * 2) % classes
    parts = {"train": np.arange(n), "validation": np.arange(n, 2 * n), "test": np.arange(2 * n, 3 * n)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HELD", 7 * d)
        found = fit(lambda rows: torch.tensor(values)[rows], {"a": labels}, parts, [penalty])["a"]
    scaler = StandardScaler().fit(values[:n])
    model = RidgeClassifier(alpha=penalty * n).fit(scaler.transform(values[:n]), labels[:n])
    assert (found.predicted == model.predict(scaler.transform(values[2 * n :]))).all()
    right = (model.predict(scaler.transform(values[n : 2 * n])) == labels[n : 2 * n]).mean()
    assert found.validation == pytest.approx(right)


def test_the_penalty_is_chosen_on_validation() -> None:
    """The one with which scikit-learn's model does best there, never on the test rows."""
    rng = np.random.default_rng(1)
    labels = rng.integers(2, size=180)
    values = rng.standard_normal((180, 80))
    values[:, 0] += labels
    parts = {"train": np.arange(60), "validation": np.arange(60, 120), "test": np.arange(120, 180)}
    found = fit(lambda rows: torch.tensor(values)[rows], {"a": labels}, parts)["a"]
    scaler = StandardScaler().fit(values[:60])
    right = {}
    for penalty in PENALTIES:
        model = RidgeClassifier(alpha=penalty * 60).fit(scaler.transform(values[:60]), labels[:60])
        right[penalty] = (model.predict(scaler.transform(values[60:120])) == labels[60:120]).mean()
    assert found.validation == max(right.values())
    assert found.penalty == max(penalty for penalty, value in right.items() if value == found.validation)
    assert len(set(right.values())) > 1


def test_what_is_planted_is_found_and_what_is_not_is_chance() -> None:
    """Labels on an axis of their own are read, as well as a logistic regression does; random ones are not."""
    data = planted()
    found = probed(data)
    rows = {part: np.flatnonzero(mask[data["samples"]]) for part, mask in deal_out(np.arange(120)).items()}
    values = data["values"].numpy()
    logistic = LogisticRegression(max_iter=1000).fit(values[rows["train"]], data["labels"][rows["train"]])
    expected = logistic.score(values[rows["test"]], data["labels"][rows["test"]])
    assert found.accuracy() == pytest.approx(expected, abs=0.03)
    assert found.accuracy() > 0.9
    assert found.accuracy("shuffled") < 0.55
    random = np.random.default_rng(5).integers(3, size=120)[data["samples"]]
    assert probed(data, random).accuracy() < 0.55


def test_the_control_task_is_learnt_by_heart_where_types_can_be_read() -> None:
    """Selectivity is what is left: nothing where the label is the type, much where types are not in the rows."""
    data = planted()
    seen = probed(data)
    assert seen.accuracy("control") > 0.9
    assert abs(seen.selectivity) < 0.1
    data["types"] = np.random.default_rng(3).integers(40, size=600)
    unseen = probed(data)
    assert unseen.accuracy("control") < 0.6
    assert unseen.selectivity > 0.4


@given(n=st.integers(1, 300), types=st.integers(1, 30), seed=SEEDS)
def test_control_labels_are_fixed_per_type(n: int, types: int, seed: int) -> None:
    """One label for every type, only labels that there are, and the same for the same seed."""
    rng = np.random.default_rng(seed)
    own, labels = rng.integers(types, size=n), rng.integers(4, size=n)
    found = control_labels(own, labels, seed)
    assert all(len(set(found[own == one])) == 1 for one in own)
    assert set(found) <= set(labels)
    assert (found == control_labels(own, labels, seed)).all()


def test_control_labels_have_the_distribution_of_the_true_ones() -> None:
    """Nine of ten, as among the rows."""
    labels = np.array([0] * 900 + [1] * 100)
    assert control_labels(np.arange(5000) % 5000, np.resize(labels, 5000)).mean() == pytest.approx(0.1, abs=0.02)


def test_no_rows_of_one_sample_or_picture_on_both_sides() -> None:
    """Every row of a sample holds its random label in its own way: split by rows it is learnt by heart, by samples not.

    And two samples that share a picture are one.
    """
    rng = np.random.default_rng(0)
    samples = np.repeat(np.arange(100), 8)
    pictures = rng.standard_normal((50, 60))[samples // 2] + 0.1 * rng.standard_normal((800, 60))
    data = {"values": torch.tensor(pictures), "samples": samples, "types": np.zeros(800, dtype=int)}
    labels = rng.integers(2, size=50)[samples // 2]
    groups = joined(100, np.arange(0, 100, 2), np.arange(1, 100, 2))
    honest = linear_probe(lambda rows: data["values"][rows], labels, data["types"], samples, deal_out(groups))
    by_sample = linear_probe(
        lambda rows: data["values"][rows], labels, data["types"], samples, deal_out(np.arange(100))
    )
    assert honest.accuracy() < 0.75
    assert by_sample.accuracy() > honest.accuracy() + 0.1
    parts = deal_out(groups)
    sides = [set((np.flatnonzero(mask) // 2).tolist()) for mask in parts.values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 50


def test_labels_of_samples_are_shuffled_over_samples() -> None:
    """Where a sample has one label, its rows keep a common one; else rows are shuffled; others stay."""
    samples = np.repeat(np.arange(40), 3)
    part = samples < 30
    labels = (np.arange(40) % 4)[samples]
    found = shuffled_labels(labels, samples, part)
    assert (found[~part] == labels[~part]).all()
    assert all(len(set(found[samples == one])) == 1 for one in range(40))
    assert sorted(found) == sorted(labels)
    assert (found != labels).any()
    by_row = shuffled_labels(np.arange(120), samples, part)
    assert sorted(by_row) == list(range(120))
    assert any(abs(np.diff(by_row[samples == one])).max() > 2 for one in range(30))


def test_pseudo_values_are_a_bootstrap_over_samples() -> None:
    """Their mean is the accuracy over rows, their spread that of whole samples drawn anew, of unequal sizes."""
    data = planted(noise=1.5)
    data["labels"] = np.where(np.random.default_rng(0).random(600) < 0.5, -1, data["labels"])
    found, rng = probed(data), np.random.default_rng(0)
    names, places = np.unique(found.samples, return_inverse=True)
    right, rows = np.bincount(places, found.right["task"]), np.bincount(places)
    pseudo = found.pseudo("task").numpy()
    assert pseudo.mean() == pytest.approx(found.accuracy(), abs=1e-12)
    drawn = rng.integers(len(names), size=(4000, len(names)))
    expected = (right[drawn].sum(1) / rows[drawn].sum(1)).std()
    assert pseudo[drawn].mean(1).std() == pytest.approx(expected, rel=0.1)
    assert float(found.pseudo("selectivity").mean()) == pytest.approx(found.selectivity, abs=1e-12)
    assert found.counts["without_label"] == int((data["labels"] < 0).sum())


def test_majority_and_unknown_labels() -> None:
    """The commonest training label; a label that training lacks is wrong, and counted."""
    data = planted()
    parts = deal_out(np.arange(120))
    labels = np.zeros(600, dtype=int)
    labels[::7] = 1
    only_test = np.flatnonzero(parts["test"][data["samples"]])[:4]
    labels[only_test] = 2
    found = probed(data, labels)
    test = np.flatnonzero(parts["test"][data["samples"]])
    assert found.accuracy("majority") == pytest.approx((labels[test] == 0).mean())
    assert found.counts["test_labels_unknown"] == 4
    assert not found.right["task"][np.isin(test, only_test)].any()


def test_what_is_refused() -> None:
    """With the reason and the remedy."""
    data = planted()
    with pytest.raises(BadInputError, match="1 different labels; a probe needs two at least"):
        probed(data, np.zeros(600, dtype=int))
    with pytest.raises(BadInputError, match=r"penalties=\[0\]; give one at least, all above 0"):
        probed(data, penalties=[0])
    with pytest.raises(BadInputError, match="600 labels, 2 types"):
        probed({**data, "types": np.zeros(2, dtype=int)})
    both = deal_out(np.arange(120))
    both["test"] = both["test"] | both["train"]
    with pytest.raises(BadInputError, match="in two of training, validation and test"):
        linear_probe(lambda rows: data["values"][rows], data["labels"], data["types"], data["samples"], both)
    no_test = np.where(deal_out(np.arange(120))["test"][data["samples"]], -1, data["labels"])
    with pytest.raises(BadInputError, match="no rows for test"):
        probed(data, no_test)
    data["values"][500, 3] = float("nan")
    with pytest.raises(BadInputError, match="row 500 of the representations is not finite"):
        probed(data)
