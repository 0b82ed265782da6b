"""Words, sentences and contexts of a store's rows; which samples share a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from analyses.layers import Layers
from analyses.occurrences import Occurrences, pictures
from hooked_mm.errors import BadInputError
from hooked_mm.store import ActivationStore
from tests.layered import layered_store

SAMPLES = [0] * 4 + [1] * 4 + [2] * 5
MODALITY = ["text", "image", "image", "text"] * 2 + ["text", "image", "image", "image", "text"]
WORDS = ["<s>", None, None, "red", "<s>", None, None, "red", "<s>", None, None, None, None]


def rows(seed: int = 0) -> torch.Tensor:
    """A deep layer: what stands before the first difference is the same; samples 0 and 1 show one picture."""
    made = torch.randn(13, 6, generator=torch.Generator().manual_seed(seed))
    made[[4, 8]] = made[0].clone()
    made[[5, 6]] = made[[1, 2]].clone()
    return made


def layers(path: Path, **options: object) -> Layers:
    """Three samples, the last with a picture of three patches and a row whose token was not kept."""
    values = {0: torch.zeros(13, 6), 3: rows()}
    return Layers.of_store(layered_store(path, values, SAMPLES, MODALITY, WORDS, **options))  # type: ignore[arg-type]


def test_words_and_contexts(tmp_path: Path) -> None:
    """Tokens and patches are words; repeated contexts point to the first."""
    found = Occurrences.of(layers(tmp_path))
    names = [None if word < 0 else found.names[word] for word in found.words]
    patches = ["patch 0", "patch 1"]
    assert names == ["<s>", *patches, "red", "<s>", *patches, "red", "<s>", *patches, "patch 2", None]
    assert found.samples.tolist() == SAMPLES
    assert found.firsts.tolist() == [0, 1, 2, 3, 0, 1, 2, 7, 0, 9, 10, 11, 12]
    assert found.notes == ["pictures have 2 to 3 patches, so a patch's number is not the same place in all"]


def test_at_the_embeddings_all_contexts_look_the_same(tmp_path: Path) -> None:
    """So they are not told apart there, and that is said."""
    whole = layers(tmp_path)
    found = Occurrences.of(Layers(whole.store, {0: whole.hooks[0]}))
    assert (found.firsts == np.arange(13)).all()
    assert "only layer 0 is there" in found.notes[0]


def test_samples_that_share_a_picture(tmp_path: Path) -> None:
    """By what their last patches hold, by the picture's path, or by a column that says so."""
    whole = layers(tmp_path / "a")
    groups, notes = pictures(whole, Occurrences.of(whole))
    assert (groups[0] == groups[1]) & (groups[1] != groups[2])
    assert notes == ["1 of 3 samples share a picture with another"]
    columns = [{"image": ["a.png"], "place": "snow"}, {"image": ["b.png"], "place": "sea"}, {"image": ["b.png"]}]
    named = layers(tmp_path / "b", columns=[{**one, "place": one.get("place", "snow")} for one in columns])
    text = named.of("text")
    assert pictures(text, Occurrences.of(text))[0].tolist() == [0, 1, 1]
    by_column, notes = pictures(text, Occurrences.of(text), "place")
    assert (by_column.tolist(), notes) == ([0, 1, 0], [])
    with pytest.raises(BadInputError, match="no column 'plaice'; nearest: place"):
        pictures(text, Occurrences.of(text), "plaice")


def test_without_pictures_in_the_store_it_is_said(tmp_path: Path) -> None:
    """Nobody can know whether two texts were about one picture."""
    text = layers(tmp_path).of("text")
    groups, notes = pictures(text, Occurrences.of(text))
    assert sorted(groups) == [0, 1, 2]
    assert "name a column that says so" in notes[0]


def test_an_empty_part(tmp_path: Path) -> None:
    """No rows, no words."""
    whole = layers(tmp_path)
    store: ActivationStore = whole.store.where(word="nothing")
    assert Occurrences.of(Layers(store, whole.hooks)).words.tolist() == []
