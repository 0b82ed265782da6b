"""Dictionaries on disk: what was saved comes back, and what is no dictionary is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary
from concept_dict.kmeans import KMeans
from concept_dict.semi_nmf import SemiNMF
from hooked_mm.errors import BadInputError

HOOK = "blocks.3.hook_resid_post"
MADE_BY = {"model": "small", "seed": 3, "hooks": [HOOK], "text": 'quotes " and ümlauts'}
ROWS = np.random.default_rng(0).standard_normal((60, 8)) + 2
METHODS = {
    "semi-NMF": SemiNMF(4),
    "semi-NMF without price": SemiNMF(4, alpha=0, center=False, init="svd"),
    "one hot": KMeans(4),
    "inverse distance": KMeans(4, activation="inverse_distance", center=False),
    "cosine": KMeans(4, activation="cosine"),
}


def _saved(method: str, folder: Path) -> ConceptDictionary:
    made = ConceptDictionary(clone(METHODS[method]).fit(ROWS), HOOK, MADE_BY)
    assert made.save(folder) == folder
    return made


@pytest.mark.parametrize("method", METHODS)
def test_round_trip(method: str, tmp_path: Path) -> None:
    """A loaded dictionary gives the same activations and rows, and knows where it comes from."""
    made = _saved(method, tmp_path / "deep" / "folder")
    loaded = ConceptDictionary.load(str(tmp_path / "deep" / "folder"))
    assert type(loaded.decomposition) is type(made.decomposition)
    assert loaded.decomposition.get_params() == made.decomposition.get_params()
    assert (loaded.hook, loaded.made_by) == (HOOK, MADE_BY)
    assert torch.equal(loaded.concepts, made.concepts)
    fresh = np.random.default_rng(1).standard_normal((20, 8)) + 2
    activations = made.transform(fresh)
    assert activations.any()
    assert torch.equal(loaded.transform(fresh), activations)
    assert torch.equal(
        loaded.decomposition.inverse_transform(activations), made.decomposition.inverse_transform(activations)
    )


@pytest.mark.parametrize("method", METHODS)
def test_fitted_numbers_come_back(method: str, tmp_path: Path) -> None:
    """Error, iterations, convergence, price and counts are what the fit reported."""
    made = _saved(method, tmp_path).decomposition
    loaded = ConceptDictionary.load(tmp_path).decomposition
    names = [name for name in vars(made) if name.endswith("_") and isinstance(getattr(made, name), int | float)]
    assert {"reconstruction_err_", "n_iter_"} < set(names)
    for name in names:
        assert getattr(loaded, name) == getattr(made, name)
        assert type(getattr(loaded, name)) is type(getattr(made, name))


@given(n=st.integers(3, 20), k=st.integers(1, 3), d=st.integers(1, 5), scale=st.sampled_from([1e-20, 1.0, 1e10]))
def test_round_trip_of_any_size(tmp_path_factory: pytest.TempPathFactory, n: int, k: int, d: int, scale: float) -> None:
    """Saving loses no bit, whatever the sizes and the scale of the rows."""
    rows = np.random.default_rng(n * k * d).standard_normal((n, d)) * scale
    made = ConceptDictionary(SemiNMF(k, max_iter=3).fit(rows), HOOK)
    loaded = ConceptDictionary.load(made.save(tmp_path_factory.mktemp("dictionary")))
    assert torch.equal(loaded.transform(rows), made.transform(rows))
    assert loaded.made_by == {}


@pytest.mark.parametrize("method", METHODS)
def test_only_safetensors_and_json(method: str, tmp_path: Path) -> None:
    """The folder holds two files that other programs can read: tensors by name, and their story."""
    made = _saved(method, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dictionary.json", "dictionary.safetensors"]
    with safe_open(tmp_path / "dictionary.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("components_"), made.concepts.numpy())
        np.testing.assert_array_equal(file.get_tensor("mean_"), made.decomposition.mean_.numpy())
    content = json.loads((tmp_path / "dictionary.json").read_text())
    assert (content["format"], content["method"]) == (1, type(made.decomposition).__name__)
    assert content["parameters"]["n_components"] == 4


def test_saving_again_replaces(tmp_path: Path) -> None:
    """A second dictionary in the same folder leaves nothing of the first."""
    _saved("one hot", tmp_path)
    made = _saved("semi-NMF", tmp_path)
    loaded = ConceptDictionary.load(tmp_path)
    assert torch.equal(loaded.concepts, made.concepts)
    assert not hasattr(loaded.decomposition, "cluster_centers_")


def test_a_folder_without_a_dictionary_is_refused(tmp_path: Path) -> None:
    """An empty or missing folder is named."""
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(BadInputError, match=rf"{folder.name}' holds no concept dictionary: there is no dictionary"):
            ConceptDictionary.load(folder)


@pytest.mark.parametrize(("key", "value"), [("format", 2), ("format", None), ("method", "Eval"), ("method", None)])
def test_an_unknown_format_or_method_is_refused(key: str, value: object, tmp_path: Path) -> None:
    """What this version does not read is refused, with what it found and what it reads."""
    _saved("semi-NMF", tmp_path)
    content = json.loads((tmp_path / "dictionary.json").read_text())
    (tmp_path / "dictionary.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(BadInputError, match=rf"{key} {value!r}.* reads format 1 and SemiNMF, KMeans"):
        ConceptDictionary.load(tmp_path)


@pytest.mark.parametrize("method", [SemiNMF(2), KMeans(2)])
def test_what_is_not_fitted_is_not_saved(method: Decomposition, tmp_path: Path) -> None:
    """A dictionary without concepts is refused when it is saved, not when somebody loads it."""
    with pytest.raises(NotFittedError, match="not fitted yet"):
        ConceptDictionary(method, HOOK).save(tmp_path)
