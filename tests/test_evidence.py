"""What a store tells of its samples, and what metrics share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from concept_dict.dictionary import ConceptDictionary
from concept_dict.evidence import Case, Evidence, Samples
from concept_dict.random_dictionary import RandomDictionary
from concept_dict.semi_nmf import SemiNMF
from hooked_mm.store import ActivationStore

ROWS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def _store(path: Path, **columns: list) -> ActivationStore:
    """Three samples with two rows each, and these columns."""
    rows = [
        {"sample": f"s{n // 2}", "position": n, "modality": "text", "role": "answer", "word": None, "selector": "all"}
        for n in range(6)
    ]
    samples = [{"sample": f"s{n}", **{name: values[n] for name, values in columns.items()}} for n in range(3)]
    return ActivationStore.from_arrays(path, {"h": ROWS.bfloat16()}, rows, samples, {"model": "m", "hooks": ["h"]})


def test_a_store_tells_what_it_has(tmp_path: Path) -> None:
    """Facts, captions and paths where every sample has them; the data set's captions come before the model's."""
    facts = [["colour=red"], [], ["colour=red", "shape=ring"]]
    full = _store(tmp_path / "a", facts=facts, answer=["x", "y", "z"], text=["1", "2", "3"], image=["p", "q", "r"])
    found = Samples.of(full, "h")
    assert torch.equal(found.rows, ROWS.bfloat16())
    assert found.sample.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.count == 3
    assert (found.facts, found.captions, found.images) == (facts, ["x", "y", "z"], ["p", "q", "r"])
    part = Samples.of(
        _store(tmp_path / "b", answer=["x", None, "z"], text=["1", "2", "3"]), "h", images=["a", "b", "c"]
    )
    assert (part.facts, part.captions, part.images) == (None, ["1", "2", "3"], ["a", "b", "c"])
    bare = Samples.of(_store(tmp_path / "c"), "h")
    assert (bare.facts, bare.captions, bare.images) == (None, None, None)


class _Fixed:
    """A dictionary whose activations are the rows themselves, or what of them is positive."""

    components_, mean_ = torch.eye(4), torch.zeros(4)

    def __init__(self, signed: bool) -> None:
        self.signed = signed

    def transform(self, X: torch.Tensor) -> torch.Tensor:
        return X.float() if self.signed else X.float().clamp_min(0)


@pytest.mark.parametrize("signed", [True, False])
def test_both_ends_of_signed_activations(signed: bool) -> None:
    """Signed activations are 2k concepts, pooled each by itself, and the random dictionary is of the same kind."""
    rows = ROWS
    case = Case(ConceptDictionary(_Fixed(signed), "h"), Evidence(Samples(rows, np.arange(6) // 2, 3)))  # type: ignore[arg-type]
    assert case.signed == signed
    assert case.random.signed == signed
    expected = rows.reshape(3, 2, 4).amax(dim=1).clamp_min(0)
    if signed:
        expected = torch.cat([expected, (-rows).reshape(3, 2, 4).amax(dim=1).clamp_min(0)], dim=1)
    np.testing.assert_allclose(case.pooled, expected)
    assert case.pooled_random.shape == case.pooled.shape


def test_matches_are_of_the_union_of_facts() -> None:
    """Facts of either set, sorted; concepts are matched on the one and scored on the other."""
    rng = np.random.default_rng(0)
    names = ["b=1", "a=2", "a=1"]
    truth = rng.random((60, 3)) < 0.5
    facts = [[name for name, holds in zip(names, row, strict=True) if holds] for row in truth]
    rows = torch.as_tensor(truth @ np.eye(3, 4) + 0.01 * rng.random((60, 4))).float()
    first, second = (Samples(rows[part], np.arange(30), 30, facts[part]) for part in (slice(30), slice(30, 60)))
    fitted = SemiNMF(3, center=False, random_state=0).fit(rows)
    case = Case(ConceptDictionary(fitted, "h"), Evidence(second, fitted=first))
    assert case.facts == ["a=1", "a=2", "b=1"]
    np.testing.assert_allclose(case.fact_match.held_out, 1.0)
    assert sorted(case.match.fact) == [0, 1, 2]
    np.testing.assert_allclose(case.match.held_out, 1.0)
    assert case.fact_match_random.held_out.mean() < 0.95
    made = RandomDictionary.like(fitted, seed=0)
    np.testing.assert_allclose(case.matching_random[0], made.transform(rows[:30]))
    np.testing.assert_allclose(case.matching[2], fitted.transform(rows[30:]))
