"""Dictionaries on disk: what was saved comes back, and what is no dictionary is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary, dictionary_folders
from concept_dict.kmeans import KMeans
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.pca import PCA
from concept_dict.semi_nmf import SemiNMF
from concept_dict.top_k_sae import TopKSAE
from concept_dict.top_norm import TopNorm
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from tests.planted import dictionary

HOOK = "blocks.3.hook_resid_post"
MADE_BY = {"model": "small", "seed": 3, "hooks": [HOOK], "text": 'quotes " and ümlauts'}
ROWS = np.random.default_rng(0).standard_normal((60, 8)) + 2
METHODS = {
    "semi-NMF": SemiNMF(4),
    "dictionary": NonNegativeDictionary(4, alpha=0.05, center=False, init="svd"),
    "principal components": PCA(4),
    "rows of largest norm": TopNorm(4),
    "sparse autoencoder": TopKSAE(4, active=2, max_iter=3),
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
    assert {"reconstruction_err_", "n_iter_"} <= set(names)
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
    with pytest.raises(
        BadInputError, match=rf"{key} {value!r}.* reads format 1 and SemiNMF, NonNegativeDictionary, KMeans"
    ):
        ConceptDictionary.load(tmp_path)


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "of another"])
def test_halves_of_two_dictionaries_are_refused(damage: str, tmp_path: Path) -> None:
    """Tensors that are not those the JSON speaks of are never read: a copy cut short, a save that was killed."""
    _saved("semi-NMF", tmp_path / "a")
    file = tmp_path / "a" / "dictionary.safetensors"
    if damage == "changed":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "gone":
        file.unlink()
    else:
        _saved("one hot", tmp_path / "b")
        file.write_bytes((tmp_path / "b" / "dictionary.safetensors").read_bytes())
    with pytest.raises(BadInputError, match=r"is not the file that dictionary.json speaks of.*by half"):
        ConceptDictionary.load(tmp_path / "a")


@pytest.mark.parametrize("killed", range(4))
def test_a_save_that_is_killed_leaves_all_or_refuses(
    killed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any of its four steps (write, replace, write, replace), the folder is the old dictionary or refused."""
    made = _saved("semi-NMF", tmp_path)
    steps = iter(range(4))

    def dying(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if next(steps) == killed:
                raise KeyboardInterrupt
            return step(*args)

        return run

    monkeypatch.setattr(Path, "write_bytes", dying(Path.write_bytes))
    monkeypatch.setattr("hooked_mm.tensor_folder.os.replace", dying(os.replace))
    with pytest.raises(KeyboardInterrupt):
        _saved("one hot", tmp_path)
    monkeypatch.undo()
    if killed < 2:
        assert torch.equal(ConceptDictionary.load(tmp_path).concepts, made.concepts)
    else:
        with pytest.raises(BadInputError, match="by half"):
            ConceptDictionary.load(tmp_path)
    again = _saved("one hot", tmp_path)
    assert torch.equal(ConceptDictionary.load(tmp_path).concepts, again.concepts)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("concepts.pth", "a pickle of PyTorch"),
        ("snmf.pkl", "a pickle"),
        ("model.joblib", "a pickle of scikit-learn"),
        ("sae_weights.safetensors", "tensors without our dictionary.json"),
        ("C.npz", "NumPy arrays"),
    ],
)
def test_other_formats_are_refused_by_name(name: str, kind: str, tmp_path: Path) -> None:
    """Nothing in them is opened; the file may be given itself or lie in the folder."""
    (tmp_path / name).write_bytes(b"anything")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(BadInputError, match=rf"{re.escape(repr(name))} is {re.escape(kind)}, which is not read"):
            ConceptDictionary.load(path)


def test_broken_json_is_refused(tmp_path: Path) -> None:
    """As no dictionary, with what the reader says of it."""
    _saved("semi-NMF", tmp_path)
    (tmp_path / "dictionary.json").write_text("{")
    with pytest.raises(BadInputError, match=r"dictionary.json' is no JSON"):
        ConceptDictionary.load(tmp_path)


def test_signed_methods_are_told_by_their_activations() -> None:
    """Non-negative methods have one end, signed ones two; cosines are signed."""
    signed = {name for name, method in METHODS.items() if ConceptDictionary(clone(method).fit(ROWS), HOOK).signed}
    assert signed == {"cosine", "principal components"}
    assert dictionary(HOOK, np.eye(4), mean=np.ones(4), signed=True).signed
    assert not dictionary(HOOK, np.eye(4), mean=np.ones(4)).signed


@pytest.mark.parametrize("method", [SemiNMF(2), KMeans(2)])
def test_what_is_not_fitted_is_not_saved(method: Decomposition, tmp_path: Path) -> None:
    """A dictionary without concepts is refused when it is saved, not when somebody loads it."""
    with pytest.raises(NotFittedError, match="not fitted yet"):
        ConceptDictionary(method, HOOK).save(tmp_path)


def test_a_model_that_it_was_not_learnt_on_is_refused(small: Callable[[str], HookedMM], tmp_path: Path) -> None:
    """By its name wherever its folder lies, by its hook, by its width; one that nothing is known of is not."""
    llava, molmo = small("llava"), small("molmo")
    wide = np.random.default_rng(0).standard_normal((20, llava.cfg.d_model))
    fitted = PCA(2).fit(wide)
    own = ConceptDictionary(fitted, HOOK, {"model": "/elsewhere/llava", "revision": None})
    own.check_model(llava)
    ConceptDictionary(fitted, HOOK).check_model(molmo)
    with pytest.raises(BadInputError, match=r"learnt on the model '/elsewhere/llava'.*molmo.*learn a dictionary"):
        own.check_model(molmo)
    with pytest.raises(BadInputError, match=r"blocks\.99.*which this model has not"):
        ConceptDictionary(fitted, "blocks.99.hook_resid_post").check_model(llava)
    with pytest.raises(BadInputError, match="have width 8, this model's stream 128"):
        ConceptDictionary(PCA(2).fit(ROWS), HOOK).check_model(llava)


def test_where_dictionaries_lie(tmp_path: Path) -> None:
    """In a folder itself, in those of a run in the order of their names, or nowhere."""
    for name in ("b", "a"):
        _saved("principal components", tmp_path / "run" / name)
    (tmp_path / "run" / "log").mkdir()
    assert dictionary_folders(tmp_path / "run") == [tmp_path / "run" / "a", tmp_path / "run" / "b"]
    assert dictionary_folders(tmp_path / "run" / "a") == [tmp_path / "run" / "a"]
    assert dictionary_folders(tmp_path / "nowhere") == dictionary_folders(tmp_path) == []
