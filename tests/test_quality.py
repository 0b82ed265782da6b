"""What a dictionary leaves over and how it behaves: scikit-learn, float64 by hand, planted concepts."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import r2_score

from concept_dict import quality
from concept_dict.kmeans import KMeans
from concept_dict.quality import matched_cosines, overlap, reconstruction, stability
from concept_dict.semi_nmf import SemiNMF
from hooked_mm.errors import BadInputError

SEEDS = st.integers(0, 2**31 - 1)


def _made(concepts: torch.Tensor, mean: torch.Tensor, codes: torch.Tensor, rows: torch.Tensor) -> Any:
    """A dictionary that gives rows the activations it was told, by looking them up."""

    def look_up(chunk: torch.Tensor) -> torch.Tensor:
        places = [int((rows == row).all(dim=1).nonzero()[0, 0]) for row in chunk]
        return codes[places]

    return SimpleNamespace(components_=concepts, mean_=mean, transform=look_up)


@given(n=st.integers(2, 40), k=st.integers(1, 5), seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_reconstruction_by_hand(n: int, k: int, seed: int, dtype: torch.dtype) -> None:
    """Error in float64 by NumPy, variance explained by scikit-learn, counts by loops; chunks make no difference."""
    drawn = torch.Generator().manual_seed(seed)
    rows = (torch.randn(n, 6, generator=drawn) * 3 + 1).to(dtype)
    concepts, mean = torch.randn(k, 6, generator=drawn), torch.randn(6, generator=drawn)
    codes = torch.randn(n, k, generator=drawn).relu()
    made = _made(concepts, mean, codes, rows)
    found = reconstruction(made, rows)
    z, a, c, m = (value.double().numpy() for value in (rows, codes, concepts, mean))
    expected = np.linalg.norm(z - m - a @ c) / np.linalg.norm(z - m)
    assert found.relative_error == pytest.approx(expected, rel=1e-9)
    r2 = r2_score(z, a @ c + m, multioutput="variance_weighted")
    assert found.variance_explained == pytest.approx(r2, rel=1e-6, abs=1e-9)
    assert found.sparsity == pytest.approx(np.mean([sum(value > 0 for value in row) / k for row in a]))
    assert found.dead.tolist() == [concept for concept in range(k) if not a[:, concept].any()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "CHUNK", 3)
        again = reconstruction(made, rows)
    assert again.relative_error == pytest.approx(found.relative_error, rel=1e-12)
    assert again.dead.tolist() == found.dead.tolist()


def test_negative_activations_are_active() -> None:
    """A signed method's concept that is only ever negative is not dead."""
    rows = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    codes = torch.tensor([[0.0, 0.0], [-2.0, 0.0]])
    found = reconstruction(_made(torch.eye(2), torch.zeros(2), codes, rows), rows)
    assert found.dead.tolist() == [1]
    assert found.sparsity == 0.25
    assert found.relative_error == pytest.approx((1 / 5) ** 0.5)


@pytest.mark.parametrize("method", [SemiNMF, KMeans])
def test_the_relative_error_is_that_of_the_fit(method: Any) -> None:
    """On the rows it was fitted on, the error is the decomposition's own."""
    rows = torch.randn(120, 10, generator=torch.Generator().manual_seed(1)) + 2
    fitted = method(4, random_state=0).fit(rows)
    found = reconstruction(fitted, rows)
    size = float((rows - rows.mean(dim=0)).norm())
    assert found.relative_error == pytest.approx(fitted.reconstruction_err_ / size, rel=1e-4)
    # The mean is that of the rows themselves here, so that both scores say the same.
    assert found.variance_explained == pytest.approx(1 - found.relative_error**2, abs=1e-5)
    if method is KMeans:
        assert found.sparsity == pytest.approx(1 / 4)


def test_nothing_to_score_is_refused() -> None:
    """No rows, or rows that are all the mean."""
    made = _made(torch.eye(2), torch.ones(2), torch.zeros(3, 2), torch.ones(3, 2))
    with pytest.raises(BadInputError, match="no rows to score"):
        reconstruction(made, torch.zeros(0, 2))
    with pytest.raises(BadInputError, match="every row is the dictionary's mean"):
        reconstruction(made, torch.ones(3, 2))


def test_rows_that_are_all_the_same_have_no_variance() -> None:
    """There is an error, but nothing of which a share could be explained."""
    rows = torch.ones(3, 2)
    found = reconstruction(_made(torch.eye(2), torch.zeros(2), torch.zeros(3, 2), rows), rows)
    assert found.relative_error == 1.0
    assert np.isnan(found.variance_explained)


@given(st.lists(st.lists(st.integers(0, 6), max_size=5), max_size=6))
def test_overlap_by_hand(lists: list[list[int]]) -> None:
    """The formula, pair by pair; repetitions within a list count once."""
    sets = [set(entries) for entries in lists]
    pairs = [(i, j) for i, j in itertools.permutations(range(len(sets)), 2) if sets[i]]
    found = overlap(lists)
    if not pairs:
        assert np.isnan(found)
        return
    expected = sum(sum(item in sets[j] for item in sets[i]) / len(sets[i]) for i, j in pairs) / len(pairs)
    assert found == pytest.approx(expected)
    assert 0 <= found <= 1


def test_xl_vlms_fault_half_precision_arithmetic() -> None:
    """Rows in float16 whose squares float16 can't hold are scored in float32 or better."""
    drawn = torch.Generator().manual_seed(3)
    rows = (torch.randn(50, 8, generator=drawn) * 400).half()
    concepts, codes = torch.eye(8)[:3], rows[:, :3].float()
    assert bool(rows.square().sum().isinf())
    found = reconstruction(_made(concepts, torch.zeros(8), codes, rows), rows)
    z = rows.double().numpy()
    assert found.relative_error == pytest.approx(np.linalg.norm(z[:, 3:]) / np.linalg.norm(z), rel=1e-9)


def test_xl_vlms_fault_substring_matching() -> None:
    """Whole words in any case: "no" is no part of "snow"; a shorter list's share is of its own length."""
    assert overlap([["no", "cat"], ["snow", "cattle"]]) == 0
    assert overlap([["Red", "blue"], ["red", "blue"], ["BLUE", "RED"]]) == 1
    assert overlap([["red"], ["red", "blue", "green", "black"]]) == pytest.approx((1 + 1 / 4) / 2)


def _best_by_trying(cosines: np.ndarray) -> float:
    k = len(cosines)
    return max(sum(cosines[i, order[i]] for i in range(k)) for order in itertools.permutations(range(k)))


@given(k=st.integers(1, 5), seed=SEEDS, signed=st.booleans())
def test_matching_is_the_best_of_all(k: int, seed: int, signed: bool) -> None:
    """Against every permutation there is, in float64."""
    one, other = torch.randn(2, k, 4, generator=torch.Generator().manual_seed(seed))
    cosines = np.array(
        [[float(a.double() @ b.double() / (a.double().norm() * b.double().norm())) for b in other] for a in one]
    )
    expected = _best_by_trying(np.abs(cosines) if signed else cosines)
    assert matched_cosines(one, other, signed=signed).sum() == pytest.approx(expected, abs=1e-9)


@given(k=st.integers(2, 6), seed=SEEDS)
def test_order_scale_and_sign(k: int, seed: int) -> None:
    """The same concepts in another order and of other lengths are found again; turned round only where signed."""
    drawn = torch.Generator().manual_seed(seed)
    concepts = torch.linalg.qr(torch.randn(8, 8, generator=drawn))[0][:k]
    again = concepts[torch.randperm(k, generator=drawn)] * (1 + torch.rand(k, 1, generator=drawn))
    assert stability([concepts, again, concepts.half()]) == pytest.approx(1, abs=2e-3)
    assert stability([concepts, -again], signed=True) == pytest.approx(1, abs=1e-6)
    # All turned round, the best that is left is to match each concept with one that is orthogonal to it.
    assert stability([concepts, -again]) == pytest.approx(0, abs=1e-6)


def test_stability_is_the_mean_over_pairs() -> None:
    """Three runs in the plane, of which two agree."""
    one, turned = torch.eye(2), torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    assert stability([one, turned]) == pytest.approx(0.6)
    assert stability([one, one, turned]) == pytest.approx((1 + 0.6 + 0.6) / 3)


def test_partners_are_taken_once() -> None:
    """Two like concepts can't both be matched with the one concept they resemble."""
    one, other = torch.tensor([[1.0, 0.0], [1.0, 0.01]]), torch.eye(2)
    found = matched_cosines(one, other)
    assert sorted(found.round(2)) == [0.01, 1.0]
    assert matched_cosines(torch.zeros(1, 2), torch.ones(1, 2)).tolist() == [0.0]


def test_runs_that_can_not_be_compared() -> None:
    """Too few, or of other shapes."""
    with pytest.raises(BadInputError, match="got 1; fit with at least two seeds"):
        stability([torch.eye(2)])
    with pytest.raises(BadInputError, match=r"\(2, 2\) and \(3, 3\) can't be matched"):
        stability([torch.eye(2), torch.eye(3)])


def test_semi_nmf_finds_planted_concepts_with_every_seed() -> None:
    """On sparse planted codes stability is near 1, and for random dictionaries of the same size far below."""
    drawn = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(4, 24, generator=drawn), dim=1)
    codes = torch.rand(400, 4, generator=drawn) * (torch.rand(400, 4, generator=drawn) < 0.3)
    rows = codes @ planted + 0.005 * torch.randn(400, 24, generator=drawn)
    runs = [SemiNMF(4, center=False, random_state=seed).fit(rows).components_ for seed in range(3)]
    assert stability(runs) > 0.95
    noise = [torch.randn(4, 24, generator=drawn) for _ in range(3)]
    assert stability(noise) < 0.4
