"""Controls have the norm of what they control for, and nothing of its direction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from hooked_mm.errors import BadInputError
from hooked_mm.steering_vector import SteeringVector, load_vectors, save_vectors
from steering.controls import controls_of, deal_labels, is_control, random_like, shuffled
from steering.directions import Make, coarse, principal, probe

SEEDS = st.integers(0, 2**31 - 1)


def differences(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first principal component of rows in the order in which they stand."""
    n = min(len(source), len(target))
    return principal(target[:n] - source[:n])


def classes(n: int = 60, m: int = 41, d: int = 20, apart: float = 8.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two classes that lie far from each other along the first axis."""
    chance = torch.Generator().manual_seed(0)
    source, target = torch.randn(n, d, generator=chance), torch.randn(m, d, generator=chance)
    target[:, 0] += apart
    return source, target


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two vectors."""
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


@given(d=st.integers(2, 50), size=st.floats(1e-3, 1e3), seed=SEEDS)
def test_random_ones_have_the_norm(d: int, size: float, seed: int) -> None:
    """The same seed gives the same one, another seed another; orthogonal ones are at right angles."""
    vector = size * torch.ones(d)
    found = random_like(vector, seed)
    assert float(found.norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
    assert torch.equal(found, random_like(vector, seed))
    assert not torch.equal(found, random_like(vector, seed + 1))
    right = random_like(vector, seed, orthogonal=True)
    assert float(right.norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
    assert abs(cosine(right, vector)) < 1e-5


def test_random_ones_are_uniform_on_the_sphere() -> None:
    """In three dimensions every coordinate of a random direction is uniform (Archimedes)."""
    drawn = torch.stack([random_like(torch.tensor([2.0, 0.0, 0.0]), seed) for seed in range(600)]).numpy()
    for axis in range(3):
        assert kstest(drawn[:, axis], "uniform", args=(-2, 4)).pvalue > 1e-3


@given(n=st.integers(2, 15), m=st.integers(2, 15), seed=SEEDS)
def test_labels_are_dealt(n: int, m: int, seed: int) -> None:
    """Each class has the same share of both true classes, no row twice, and true classes row by row."""
    source = torch.stack([torch.arange(n, dtype=torch.float32), torch.zeros(n)], dim=1)
    target = torch.stack([torch.arange(m, dtype=torch.float32), torch.ones(m)], dim=1)
    one, other = deal_labels(source, target, seed)
    assert len(one) == len(other) == n // 2 + m // 2
    assert torch.equal(one[:, 1], other[:, 1])
    assert int(one[:, 1].sum()) == m // 2
    rows = [tuple(row) for row in torch.cat([one, other]).tolist()]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= {tuple(row) for row in torch.cat([source, target]).tolist()}


def test_nothing_of_the_difference_is_left() -> None:
    """Where rows of a class are all alike, dealt labels leave exactly nothing; a shuffle by chance leaves some."""
    source, target = torch.zeros(10, 3), torch.ones(13, 3)
    assert not coarse(*deal_labels(source, target, 1)).any()
    rows = torch.cat([source, target])[torch.randperm(23, generator=torch.Generator().manual_seed(1))]
    assert coarse(rows[:10], rows[10:]).norm() > 0.1
    with pytest.raises(BadInputError, match="no direction is left"):
        shuffled(source, target, coarse, 1)


@pytest.mark.parametrize("make", [coarse, probe, differences])
def test_shuffled_labels_keep_the_norm_and_lose_the_direction(make: Make) -> None:
    """Of every recipe that is made of labels; the true vector is the planted direction."""
    source, target = classes()
    true = make(source, target)
    assert true[0] / true.norm() > 0.8
    found = [shuffled(source, target, make, seed) for seed in range(8)]
    for vector in found:
        assert float(vector.norm()) == pytest.approx(float(true.norm()), rel=1e-5)
    # In 20 dimensions chance alone gives about 1 / sqrt(20).
    assert np.mean([abs(cosine(vector, true)) for vector in found]) < 0.45
    assert len({tuple(vector.tolist()) for vector in found}) == 8
    assert torch.equal(found[0], shuffled(source, target, make, 0))


def test_signs_of_pairs_would_be_no_control() -> None:
    """Why pairs are dealt within a class: with half of their signs turned, a principal component stays the true one."""
    source, target = classes(40, 40)
    pairs = target - source
    pairs[torch.arange(40) % 2 == 0] *= -1
    assert abs(cosine(principal(pairs), coarse(source, target))) > 0.9


def test_vectors_with_provenance(tmp_path: Path) -> None:
    """Per seed one of each kind, at the same hook of the same model; they say what they control for, also on disk."""
    source, target = classes()
    about = {"seed": 5, "source": {"rows": 60}}
    vector = SteeringVector(
        coarse(source, target), "blocks.1.hook_resid_post", "coarse", "red -> blue", {"a": 1}, "m", "r", "ad", about
    )
    found = controls_of(vector, source, target, coarse, seeds=(3, 4), orthogonal=True)
    assert [(one.kind, one.made_from["control_seed"]) for one in found] == [
        *(("random", 3), ("shuffled", 3), ("random", 4), ("shuffled", 4))
    ]
    save_vectors([vector, *found], tmp_path)
    assert [is_control(one) for one in load_vectors(tmp_path)] == [False, True, True, True, True]
    for one in load_vectors(tmp_path)[1:]:
        assert (one.hook, one.model, one.revision, one.adapter) == (vector.hook, "m", "r", "ad")
        assert one.positions == {"a": 1}
        assert one.norm == pytest.approx(vector.norm, rel=1e-5)
        assert one.made_from["control_of"] == {"name": "red -> blue", "kind": "coarse", "norm": vector.norm}
        assert one.made_from["source"] == {"rows": 60}
        assert "what" in one.made_from["controls_for"]
        assert one.made_from["cosine"] == pytest.approx(cosine(one.values, vector.values), abs=1e-6)
    assert abs(cosine(found[0].values, vector.values)) < 1e-5
    # The same seed is another direction for another vector, and the same one for the same.
    (other,) = controls_of(replace(vector, name="red -> green"), seeds=(3,))
    (again,) = controls_of(vector, seeds=(3,), orthogonal=True)
    assert abs(cosine(other.values, found[0].values)) < 0.9
    assert torch.equal(again.values, found[0].values)
    assert torch.equal(found[1].values, shuffled(source, target, coarse, 3, vector.norm))
    assert [one.kind for one in controls_of(vector)] == ["random"]


def test_refusals() -> None:
    """Too few rows to be in both classes, half of what shuffling needs, nothing to be orthogonal to, NaN."""
    source, target = classes()
    with pytest.raises(BadInputError, match="1 and 41 rows"):
        shuffled(source[:1], target, coarse, 0)
    vector = SteeringVector(torch.ones(2), "h")
    with pytest.raises(BadInputError, match="all three or none"):
        controls_of(vector, source, target)
    with pytest.raises(BadInputError, match="one coordinate"):
        random_like(torch.ones(1), 0, orthogonal=True)
    with pytest.raises(BadInputError, match="NaN"):
        random_like(torch.tensor([torch.nan]), 0)
