"""Dictionaries of opened folders: read when first wanted, with the samples they were learnt on where these lie by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from concept_dict import opened_dictionaries
from concept_dict.dictionary import ConceptDictionary
from concept_dict.opened_dictionaries import open_dictionaries
from concept_dict.pca import PCA
from hooked_mm.errors import BadInputError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.selectors import EachOf
from hooked_mm.store import ActivationStore

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def run(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the demo leaves it: activations of six scenes, and a dictionary beside them."""
    folder = tmp_path_factory.mktemp("run")
    store = extract(Extractor(llava, HOOK, EachOf("image")), ScenesDataModule(6, style="full"), folder / "activations")
    ConceptDictionary(PCA(3).fit(store.activations(HOOK)), HOOK, store.made_by).save(folder / "dictionary")
    return folder


def test_samples_lie_beside_the_dictionary(run: Path) -> None:
    """Both ends of a signed concept, strongest first, with the pictures made again; by hand from the store's rows."""
    (one,) = open_dictionaries([run])
    assert one.label == f"{run.name}/dictionary"
    assert one.samples is not None
    store = ActivationStore.open(run / "activations")
    every = one.dictionary.transform(store.activations(HOOK)).numpy()
    owner = store.row_samples()
    for sign in (1, -1):
        best = [max(0.0, float((sign * every[owner == number, 1]).max())) for number in range(6)]
        found = one.samples.strongest(1, 4, sign)
        assert [shown.number for shown in found] == np.argsort([-value for value in best], kind="stable")[:4].tolist()
        assert [shown.activation for shown in found] == pytest.approx(
            [sign * b for b in sorted(best)[::-1][:4]], rel=1e-4
        )
        assert all(shown.image.size[0] > 8 and shown.text for shown in found)


def test_a_store_that_was_opened_too_serves(run: Path, tmp_path: Path) -> None:
    """A dictionary that lies elsewhere finds its samples in it; one of another model or hook does not."""
    made = ConceptDictionary.load(run / "dictionary")
    made.save(tmp_path / "own")
    ConceptDictionary(made.decomposition, HOOK, {**made.made_by, "model": "somebody/other"}).save(tmp_path / "other")
    ConceptDictionary(made.decomposition, "blocks.1.hook_resid_post", made.made_by).save(tmp_path / "hook")
    folders = [tmp_path / "own", tmp_path / "other", tmp_path / "hook", run / "activations"]
    own, other, hook = open_dictionaries(folders)
    assert own.samples is not None
    assert own.samples.folder == run / "activations"
    assert other.samples is None
    assert hook.samples is None


def test_nothing_is_read_before_it_is_wanted_and_then_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when the page starts, nor for every look."""
    loaded: list[Path] = []
    real = ConceptDictionary.load
    monkeypatch.setattr(
        opened_dictionaries.ConceptDictionary, "load", lambda folder: loaded.append(folder) or real(folder)
    )
    (one,) = open_dictionaries([run])
    assert not loaded
    assert one.dictionary is one.dictionary
    assert one.samples is one.samples
    assert loaded == [run / "dictionary"]


def test_a_folder_with_neither_is_refused(tmp_path: Path) -> None:
    """By name, with what to open instead."""
    with pytest.raises(BadInputError, match=r"holds neither a concept dictionary.*hooked-mm learn"):
        open_dictionaries([tmp_path])
