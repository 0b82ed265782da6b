"""From stores to parts, words and vectors, on stores whose numbers tell where they come from."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from concept_dict.grounding import top_words
from concept_dict.kmeans import KMeans
from concept_dict.shift_run import (
    SHARES,
    circular,
    deal,
    decoder,
    places_of,
    shift_steering_vectors,
    spelled,
    texts_of,
)
from concept_dict.shift_study import Part, study
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.paired_rows import pair_rows
from hooked_mm.steering_vector import load_vectors, save_vectors
from hooked_mm.store import ActivationStore

MADE = {
    "model": "somewhere/llava",
    "revision": "abc",
    "adapter": None,
    "selectors": {"last": {"selector": "LastPrompt"}, "other": {"selector": "MeanOver"}},
    "data": {"name": "ScenesDataModule", "seed": 3},
}


def _store(path: Path, numbers: list[int], offset: float, **made_by: object) -> ActivationStore:
    """Two rows per sample; row r of sample s is (10 s + r, offset)."""
    rows = [{"sample": f"s{n}", "position": r, "selector": "last"} for n in numbers for r in range(2)]
    values = torch.tensor([[10.0 * n + r, offset] for n in numbers for r in range(2)])
    samples = [
        {"sample": f"s{n}", "sample_number": n, "prompt": "p", "text": f"text {n}" if n % 2 else None} for n in numbers
    ]
    return ActivationStore.from_arrays(path, {"h": values.half()}, rows, samples, {**MADE, **made_by})


@pytest.fixture
def stores(tmp_path: Path) -> tuple[ActivationStore, ActivationStore]:
    """An original with samples 0 to 19 and a fine-tuned model's with 2 to 21."""
    return _store(tmp_path / "a", [*range(20)], 0.0), _store(tmp_path / "b", [*range(2, 22)], 5.0, adapter="place")


def test_parts(stores: tuple[ActivationStore, ActivationStore]) -> None:
    """Rows stand beside their own partners; every sample is in one part; numbers lead back to its id."""
    dealt = deal(*stores, pair_rows(*stores), "h", SHARES, seed=4)
    seen = []
    for name, part in dealt.parts.items():
        assert torch.equal(part.original[:, 0], part.tuned[:, 0])
        assert part.original[:, 1].unique().tolist() == [0]
        assert part.tuned[:, 1].unique().tolist() == [5]
        ids = [dealt.samples[name][number] for number in part.sample]
        assert ids == [f"s{int(value) // 10}" for value in part.original[:, 0]]
        seen += dealt.samples[name]
    assert sorted(seen) == sorted(f"s{n}" for n in range(2, 20))
    assert [len(samples) for samples in dealt.samples.values()] == [7, 6, 5]
    again = deal(*stores, pair_rows(*stores), "h", SHARES, seed=5)
    assert again.samples != dealt.samples


def test_no_pairs(tmp_path: Path) -> None:
    """It is said what has no partner."""
    one, other = _store(tmp_path / "a", [1], 0.0), _store(tmp_path / "b", [1], 0.0)
    other = other.where(position=5)
    with pytest.raises(BadInputError, match="no rows of the two stores belong together"):
        deal(one, other, pair_rows(one, other), "h")


def test_texts_and_places(stores: tuple[ActivationStore, ActivationStore]) -> None:
    """What was said, or the sample's id; where samples stand in the table."""
    _, tuned = stores
    assert texts_of(tuned, ["s3", "s4"]) == ["text 3", "s4"]
    assert places_of(tuned, ["s4", "s2"]).tolist() == [2, 0]


def test_the_same_data_would_be_circular(stores: tuple[ActivationStore, ActivationStore]) -> None:
    """Told by the data that stores and dictionaries describe; not where nothing is known."""
    original, _ = stores
    assert circular(original.made_by, original)
    assert not circular({**original.made_by, "data": {"name": "ScenesDataModule", "seed": 4}}, original)
    assert not circular({}, original)


def test_words(llava: HookedMM) -> None:
    """Directions of any length decode as their unit ones do, with what is to be open while the model is read."""
    opened = []

    @contextmanager
    def reading():
        opened.append("in")
        yield
        opened.append("out")

    directions = 30 * torch.randn(3, llava.cfg.d_model, generator=torch.Generator().manual_seed(0))
    found = decoder(llava, 4, reading=reading)(directions)
    assert found == top_words(llava, directions / directions.norm(dim=1, keepdim=True), 4)
    assert opened == ["in", "out"]
    assert spelled(decoder(llava, 4))(directions) == [[word.text for word in words] for words in found]


def test_vectors_to_steer_with(stores: tuple[ActivationStore, ActivationStore], tmp_path: Path) -> None:
    """The overall shift, and one per concept that has rows, with what they are of; they survive a folder."""
    original, tuned = stores
    rng = np.random.default_rng(0)

    def part(n: int) -> Part:
        rows = torch.from_numpy(rng.normal(size=(n, 2)) + 8 * rng.integers(0, 2, size=(n, 1))).float()
        return Part(rows, rows + torch.tensor([0.0, 5.0]), np.arange(n))

    found = study(KMeans(2, random_state=0), part(30), part(30), learn=part(30))
    kept = shift_steering_vectors(found, original, tuned, "h", [["red", "blue"], []])
    assert [vector.name for vector in kept] == ["all concepts", "concept 0: red, blue", "concept 1"]
    for vector in kept:
        torch.testing.assert_close(vector.values, torch.tensor([0.0, 5.0]), atol=1e-5, rtol=0)
        assert (vector.kind, vector.hook, vector.model, vector.adapter) == ("shift", "h", "somewhere/llava", None)
        assert vector.positions == {"last": {"selector": "LastPrompt"}}
        assert vector.made_from["tuned"] == {"model": "somewhere/llava", "revision": "abc", "adapter": "place"}
    assert sum(vector.made_from["rows"] for vector in kept[1:]) == kept[0].made_from["rows"] == 30
    save_vectors(kept, tmp_path / "vectors")
    assert [vector.made_from for vector in load_vectors(tmp_path / "vectors")] == [v.made_from for v in kept]
