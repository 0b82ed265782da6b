"""Anisotropy against golden values, scikit-learn's PCA, all pairs by hand, and what is known of planted directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

from analyses.anisotropy import UnitSum, anisotropy, mean_cosine, principal
from analyses.moments import moments
from hooked_mm.errors import BadInputError
from tests.geometry import golden, in_processes


def by_pairs(rows: Tensor) -> float:
    """The mean cosine over all pairs, one after the other."""
    found = [
        torch.nn.functional.cosine_similarity(rows[i].double(), rows[j].double(), dim=0).item()
        for i in range(len(rows))
        for j in range(i)
    ]
    return sum(found) / len(found)


def test_golden_value() -> None:
    """s_1^2 / sum s_i^2 of the centred rows; from moments of parts as well."""
    x = golden().x
    assert anisotropy(x) == pytest.approx(0.11691305, abs=1e-6)
    assert principal(moments(x[:100]) + moments(x[100:]))[0] == pytest.approx(0.11691305, abs=1e-6)


@given(n=st.integers(2, 60), d=st.integers(1, 8), seed=st.integers(0, 99), far=st.sampled_from([0.0, 100.0]))
def test_agrees_with_principal_components(n: int, d: int, seed: int, far: float) -> None:
    """scikit-learn's first explained variance ratio, wherever the mean is, also with fewer rows than d."""
    rows = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + far
    theirs = PCA().fit(rows.numpy())
    share, direction = principal(moments(rows))
    assert anisotropy(rows) == share == pytest.approx(theirs.explained_variance_ratio_[0], abs=1e-9)
    along = ((rows - rows.mean(0)) @ direction).square().sum() / (rows - rows.mean(0)).square().sum()
    assert float(along) == pytest.approx(share, abs=1e-9)


@given(n=st.integers(2, 25), d=st.integers(1, 6), seed=st.integers(0, 99), cut=st.integers(0, 25))
def test_mean_cosine_is_that_of_all_pairs(n: int, d: int, seed: int, cut: int) -> None:
    """Without going through them; parts add up; not centred."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 0.5
    expected = by_pairs(rows)
    assert mean_cosine(rows) == pytest.approx(expected, abs=1e-9)
    both = UnitSum.of(rows[:cut]) + UnitSum.of(rows[cut:])
    assert both.mean_cosine() == pytest.approx(expected, abs=1e-9)


def test_baseline_size_is_a_setting_and_changes_no_mean() -> None:
    """Over draws of 20 of 300 rows the mean is that of all; one draw is that of the rows drawn; the size is said."""
    rows = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)) + 0.4
    whole = mean_cosine(rows)
    sampled = torch.tensor([mean_cosine(rows, size=20, seed=seed) for seed in range(300)])
    assert float(sampled.mean()) == pytest.approx(whole, abs=4 * float(sampled.std()) / 300**0.5)
    assert float(sampled.std()) > 0.005
    drawn = torch.randperm(300, generator=torch.Generator().manual_seed(7))[:20]
    assert mean_cosine(rows, size=20, seed=7) == pytest.approx(by_pairs(rows[drawn]), abs=1e-9)
    assert mean_cosine(rows, size=300) == pytest.approx(whole, abs=1e-12)
    for size in (1, 301):
        with pytest.raises(BadInputError, match=f"size={size}"):
            mean_cosine(rows, size=size)


def test_the_two_measures_are_not_the_same() -> None:
    """A cone of directions: all cosines near 1, while about the mean none stands out; and the other way round."""
    random = torch.Generator().manual_seed(0)
    cone = 0.1 * torch.randn(2000, 20, generator=random)
    cone[:, 0] += 10
    assert mean_cosine(cone) > 0.99
    assert anisotropy(cone) == pytest.approx(1 / 20, abs=0.02)
    line = torch.randn(2000, 1, generator=random) * torch.ones(20) + 0.1 * torch.randn(2000, 20, generator=random)
    assert abs(mean_cosine(line)) < 0.05
    assert anisotropy(line) > 0.98


def test_rows_without_direction_are_left_out_and_counted() -> None:
    """Zeros have no cosine."""
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    with_zeros = torch.cat([rows[:3], torch.zeros(2, 4), rows[3:]])
    assert mean_cosine(with_zeros) == pytest.approx(by_pairs(rows), abs=1e-9)
    assert (UnitSum.of(with_zeros).n, UnitSum.of(with_zeros).zeros) == (10, 2)
    found = in_processes(lambda process: UnitSum.of(with_zeros[process.rank * 5 :][:5]).reduce(process))
    assert {(one.n, one.zeros) for one in found} == {(8, 2)}


def test_refusals() -> None:
    """Nothing that varies, one row, values that are not finite."""
    for wrong in (
        lambda: anisotropy(torch.ones(5, 3)),
        lambda: anisotropy(torch.ones(3)),
        lambda: anisotropy(torch.tensor([[0.0, torch.nan], [1.0, 2.0]])),
        lambda: mean_cosine(torch.ones(1, 3)),
        lambda: mean_cosine(torch.tensor([[0.0, torch.inf], [1.0, 2.0]])),
    ):
        with pytest.raises(BadInputError):
            wrong()


@given(n=st.integers(3, 12), d=st.integers(2, 40), seed=st.integers(0, 2**16))
def test_few_rows_of_many_dimensions(n: int, d: int, seed: int) -> None:
    """The products of rows give what singular values give, whichever are fewer."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    wide = rows.double().numpy()
    assert anisotropy(rows) == pytest.approx(PCA().fit(wide).explained_variance_ratio_[0], rel=1e-9)
