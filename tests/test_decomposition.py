"""What all decompositions share: rows refused or taken, the mean, chunks, scikit-learn's conventions."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from concept_dict import rows as rows_module
from concept_dict.decomposition import Decomposition, generator
from concept_dict.kmeans import KMeans
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.pca import PCA
from concept_dict.rows import as_rows
from concept_dict.semi_nmf import SemiNMF
from concept_dict.top_norm import TopNorm
from hooked_mm.errors import BadInputError

METHODS = [SemiNMF, NonNegativeDictionary, KMeans, PCA, TopNorm]
SEEDED = [SemiNMF, NonNegativeDictionary, KMeans]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 4)])
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """What is not (n, d) with n > 0 is refused, and the message has its shape."""
    with pytest.raises(BadInputError, match=rf"\(n, d\) with n > 0; got shape \({', '.join(map(str, shape))}"):
        as_rows(np.zeros(shape))


@given(
    n=st.integers(1, 40),
    chunk=st.integers(1, 50),
    data=st.data(),
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    dtype=st.sampled_from(DTYPES),
)
def test_a_row_that_is_not_finite_is_named(
    n: int, chunk: int, data: st.DataObject, bad: float, dtype: torch.dtype
) -> None:
    """The first row with NaN or infinity is named, wherever the boundaries of chunks lie."""
    rows = torch.zeros(n, 3, dtype=dtype)
    wrong = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3))
    rows[wrong, 1] = bad
    with (
        mock.patch.object(rows_module, "CHUNK", chunk),
        pytest.raises(BadInputError, match=rf"row {min(wrong)} of .* not finite"),
    ):
        as_rows(rows)


@pytest.mark.parametrize("method", METHODS)
def test_fit_and_transform_refuse_rows_that_are_not_finite(method: type) -> None:
    """Neither fitting nor transforming takes NaN."""
    good = _rows(12, 4)
    bad = good.copy()
    bad[7, 2] = np.nan
    fitted = method(2).fit(good)
    for call in (method(2).fit, fitted.transform):
        with pytest.raises(BadInputError, match="row 7 of the representations is not finite"):
            call(bad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_not_copied(dtype: torch.dtype) -> None:
    """A tensor of any dtype stays where and what it is: rows may be larger than memory allows as float32."""
    rows = torch.ones(4, 2, dtype=dtype)
    assert as_rows(rows).data_ptr() == rows.data_ptr()
    array = np.ones((4, 2), np.float32)
    assert as_rows(array).data_ptr() == array.ctypes.data


@given(
    n=st.integers(1, 60),
    chunk=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([0.0, 3.0, 3000.0]),
)
def test_mean_is_that_of_float64(n: int, chunk: int, dtype: torch.dtype, offset: float) -> None:
    """The mean is exact to float32 for every dtype and chunk; a sum in float16 would overflow."""
    rows = torch.as_tensor(_rows(n, 5, seed=n) + offset).to(dtype)
    with mock.patch.object(rows_module, "CHUNK", chunk):
        fitted = KMeans(1, n_init=1, max_iter=1).fit(rows)
    expected = rows.double().numpy().mean(0)
    np.testing.assert_allclose(fitted.mean_.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert fitted.mean_.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_without_centring_the_mean_is_zero(method: type) -> None:
    """`center=False` subtracts nothing."""
    assert not method(2, center=False).fit(_rows(20, 4) + 5).mean_.any()


@pytest.mark.parametrize("method", METHODS)
def test_centring_forgets_a_shift(method: type) -> None:
    """The same rows elsewhere have the same concepts and activations, and another mean."""
    # Multiples of 1/16 and a shift by 8 are exact in float32; 32 rows make the mean exact too.
    rows = np.round(_rows(32, 5) * 16) / 16
    first, second = method(3).fit(rows), method(3).fit(rows + 8)
    torch.testing.assert_close(first.components_, second.components_, rtol=0, atol=1e-6)
    torch.testing.assert_close(first.transform(rows), second.transform(rows + 8), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.mean_, first.mean_ + 8)


@pytest.mark.parametrize("method", METHODS)
def test_inverse_transform_is_a_c_plus_mean(method: type) -> None:
    """Rows from any activations, against numpy."""
    fitted = method(3).fit(_rows(30, 6) + 2)
    activations = np.abs(_rows(7, 3, seed=1)).astype(np.float32)
    expected = activations.astype(float) @ fitted.components_.double().numpy() + fitted.mean_.double().numpy()
    got = fitted.inverse_transform(torch.as_tensor(activations))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_that_of_the_reconstruction(method: type) -> None:
    """`reconstruction_err_` is ||Z - mean - A C||_F, recomputed in float64."""
    rows = _rows(50, 8) * 3 + 1
    fitted = method(4).fit(rows)
    activations, concepts = fitted.transform(rows).double().numpy(), fitted.components_.double().numpy()
    expected = np.linalg.norm(rows - rows.mean(0) - activations @ concepts)
    assert fitted.reconstruction_err_ == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", ["transform", "inverse_transform"])
def test_not_fitted(method: type, call: str) -> None:
    """An unfitted decomposition says its name and what to call."""
    with pytest.raises(NotFittedError, match=rf"this {method.__name__} is not fitted yet; call fit first"):
        getattr(method(2), call)(torch.ones(3, 2))


@pytest.mark.parametrize("method", METHODS)
def test_wrong_width(method: type) -> None:
    """Rows of another width are refused, with both widths."""
    fitted = method(2).fit(_rows(10, 4))
    with pytest.raises(BadInputError, match="rows have width 5, the concepts 4"):
        fitted.transform(_rows(3, 5))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [-1, 0, 7])
def test_a_number_of_concepts_that_rows_do_not_allow(method: type, k: int) -> None:
    """k must be between 1 and the number of rows."""
    with pytest.raises(BadInputError, match=rf"n_components={k} needs to be between 1 and the number of rows, 6"):
        method(k).fit(_rows(6, 9))


@pytest.mark.parametrize("method", METHODS)
def test_as_many_concepts_as_rows(method: type) -> None:
    """k = n is allowed, and reproduces the rows nearly exactly."""
    rows = _rows(6, 9)
    fitted = method(6, center=False).fit(rows)
    assert fitted.reconstruction_err_ < 0.05 * np.linalg.norm(rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_memory_map_gives_the_same(method: type, dtype: type, tmp_path: Path) -> None:
    """Rows on disk give what the same rows in memory give, chunk by chunk, and are not written to."""
    rows = _rows(60, 6).astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    before = (tmp_path / "rows.npy").read_bytes()
    with mock.patch.object(rows_module, "CHUNK", 17):
        mapped = method(3).fit(np.load(tmp_path / "rows.npy", mmap_mode="r+"))
        held = method(3).fit(rows)
    assert torch.equal(mapped.components_, held.components_)
    assert (tmp_path / "rows.npy").read_bytes() == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_does_not_depend_on_the_dtype(method: type, dtype: torch.dtype) -> None:
    """Rows of any dtype give exactly what the same numbers give as float32."""
    # Rounded to bfloat16, the numbers are the same in all four.
    rows = torch.as_tensor(_rows(40, 6)).bfloat16().to(dtype)
    first, second = method(3).fit(rows), method(3).fit(rows.float())
    assert torch.equal(first.components_, second.components_)
    assert torch.equal(first.transform(rows), second.transform(rows.float()))
    assert first.components_.dtype == first.transform(rows).dtype == torch.float32


@pytest.mark.parametrize("method", SEEDED)
def test_the_same_seed_gives_the_same(method: type) -> None:
    """Fitting twice with one seed gives identical numbers, whatever the global generator did in between."""
    rows = _rows(50, 6)
    first = method(5, random_state=3).fit(rows)
    torch.manual_seed(99)
    second = method(5, random_state=3).fit(rows)
    assert torch.equal(first.components_, second.components_)
    assert first.reconstruction_err_ == second.reconstruction_err_


@pytest.mark.parametrize("method", METHODS)
def test_scikit_learn_conventions(method: type) -> None:
    """`clone` keeps parameters and no results, `fit` returns the estimator, `fit_transform` is both."""
    rows = _rows(30, 5)
    made = method(3, center=False, **({"random_state": 5} if method in SEEDED else {}))
    fitted = made.fit(rows)
    assert fitted is made
    copy = clone(made)
    assert copy.get_params() == made.get_params()
    assert not hasattr(copy, "components_")
    torch.testing.assert_close(copy.fit_transform(rows), fitted.transform(rows), rtol=0, atol=0)


def test_the_base_fits_nothing() -> None:
    """Subclasses have to implement how."""
    base = Decomposition()
    for call in (base.fit, base.activations):
        with pytest.raises(NotImplementedError):
            call(torch.ones(3, 2))
    for step in (base.step, base.end):
        with pytest.raises(NotImplementedError):
            step()


def test_a_generator_is_seeded_or_fresh() -> None:
    """A seed repeats its numbers; None gives others each time."""
    assert generator(4).initial_seed() == generator(4, 3).initial_seed() == 4
    draws = [torch.rand(4, generator=generator(None)) for _ in range(2)]
    assert not torch.equal(*draws)
    with pytest.raises(BadInputError, match="random_state=None draws other numbers in every process"):
        generator(None, 2)
