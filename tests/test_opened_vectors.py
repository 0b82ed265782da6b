"""Vectors of opened folders: read as they were written, each with the expression that reads it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from concept_dict.dictionary import ConceptDictionary
from concept_dict.pca import PCA
from hooked_mm.errors import BadInputError
from hooked_mm.steering_vector import SteeringVector, save_vectors
from steering.opened_vectors import Opened, check_folders, concept_vector, read_vectors

HOOK = "blocks.1.hook_resid_post"


def again(one: Opened) -> SteeringVector:
    """What its expression gives, run on its own."""
    names: dict[str, Any] = {}
    exec(f"{one.imports}\nvector = {one.python}", names)
    vector = names["vector"]
    assert isinstance(vector, SteeringVector)
    return vector


def test_every_vector_is_read_and_its_python_reads_it_too(tmp_path: Path) -> None:
    """Steering vectors; a dictionary; a folder of dictionaries; with odd characters in its name."""
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    vectors = [SteeringVector(row, HOOK, "coarse", f"{n} → '") for n, row in enumerate(rows[:3])]
    odd = tmp_path / "it's \\ odd"
    save_vectors(vectors, odd)
    learnt = ConceptDictionary(PCA(2).fit(rows), HOOK, {"model": "owner/name", "revision": "abc"})
    learnt.save(tmp_path / "run" / "PCA-k2")
    learnt.save(tmp_path / "run" / "PCA-k2-again")
    check_folders([odd, tmp_path / "run", tmp_path / "run" / "PCA-k2"])
    found = read_vectors(odd)
    assert [one.vector.name for one in found] == [one.name for one in vectors]
    for one, row in zip(found, rows, strict=False):
        assert torch.equal(one.vector.values, row)
        assert torch.equal(again(one).values, row)
    assert len(read_vectors(tmp_path / "run" / "PCA-k2")) == 2
    found = read_vectors(tmp_path / "run")
    assert len(found) == 4
    assert (found[1].vector.model, found[1].vector.revision, found[1].vector.kind) == ("owner/name", "abc", "concept")
    for n, one in enumerate(found):
        assert torch.equal(one.vector.values, learnt.concepts[n % 2])
        assert torch.equal(again(one).values, one.vector.values)
    with pytest.raises(BadInputError, match="no concept 2"):
        concept_vector(learnt, 2)


def test_a_folder_with_neither_is_refused(tmp_path: Path) -> None:
    """By name, with what to open instead."""
    with pytest.raises(BadInputError, match=r"holds neither.*steer compute"):
        check_folders([tmp_path])
