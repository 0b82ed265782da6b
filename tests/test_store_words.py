"""Whose unembedding goes with a store."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from analyses.store_words import load_words, source_of_words
from hooked_mm.errors import BadInputError
from hooked_mm.reader import ModelSource
from hooked_mm.small import small_model_path
from hooked_mm.store import ActivationStore
from hooked_mm.unembedding import Unembedding


def store(path: Path, width: int = 128, **made_by: object) -> ActivationStore:
    values = {"blocks.0.hook_resid_post": torch.ones(1, width)}
    return ActivationStore.from_arrays(path, values, [{"sample": "a"}], [{"sample": "a"}], made_by)


def test_what_is_told_goes_before_what_the_store_says(tmp_path: Path) -> None:
    """Its model, adapter, revision and random weights."""
    told = ModelSource("told")
    held = store(tmp_path, model="held", adapter="put", revision="v1", family="llava", dtype="float32")
    assert source_of_words(Namespace(words=told, model=ModelSource("x")), held) is told
    assert source_of_words(Namespace(words=None, model=told), held) is told
    nothing = Namespace(words=None, model=None)
    assert source_of_words(nothing, held) == ModelSource("held", "float32", adapter="put", revision="v1")
    random = store(tmp_path / "random", model="held", random_weights=3)
    assert source_of_words(nothing, random) == ModelSource("held", random_weights=3)


def test_a_store_that_names_no_model_is_refused(tmp_path: Path) -> None:
    """With the way out."""
    with pytest.raises(BadInputError, match=r"give --words\.id"):
        source_of_words(Namespace(words=None, model=None), store(tmp_path))


def test_no_more_than_the_unembedding_is_loaded_and_it_must_fit(tmp_path: Path) -> None:
    """By the width of the rows."""
    source = ModelSource(str(small_model_path("llava")))
    assert isinstance(load_words(source, store(tmp_path / "fits"), "cpu"), Unembedding)
    with pytest.raises(BadInputError, match=r"rows are 7 wide, the stream of .* 128"):
        load_words(source, store(tmp_path / "narrow", 7), "cpu")
