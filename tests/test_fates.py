"""What became of concepts, where it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from concept_dict.fates import FATES, fates
from concept_dict.quality import cosines
from concept_dict.recovery import Concepts
from hooked_mm.errors import BadInputError

SEEDS = st.integers(0, 2**16)


def _placed(vectors: Tensor) -> Concepts:
    none = torch.zeros(0, dtype=torch.long)
    return Concepts(normalize(vectors), torch.zeros(vectors.shape[1]), vectors.norm(dim=1), none)


def _turned(number: int, towards: int, cosine: float, d: int = 6) -> Tensor:
    """An axis, turned towards another one until it has this cosine with where it was."""
    axes = torch.eye(d)
    return cosine * axes[number] + (1 - cosine**2) ** 0.5 * axes[towards]


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_one_of_each() -> None:
    """Found again with cosine .9: .95 is kept, .7 specialised, .3 new; the axis that nothing is near is lost."""
    original = _placed(torch.eye(6)[:3])
    again = _placed(torch.stack([_turned(n, 5, 0.9) for n in range(3)]))
    tuned = _placed(torch.stack([_turned(0, 5, 0.95), _turned(0, 4, 0.7), 3 * _turned(1, 3, 0.3)]))
    found = fates(original, again, tuned)
    assert found.same == pytest.approx(0.9)
    assert found.fate == ["kept", "specialised", "new"] == list(FATES)
    assert found.nearest.tolist() == [0, 0, 1]
    assert found.cosine.tolist() == pytest.approx([0.95, 0.7, 0.3])
    assert found.lost == [1, 2]
    assert [found.count(fate) for fate in FATES] == [1, 1, 1]
    assert fates(original, again, tuned, apart=0.2).fate == ["kept", "specialised", "specialised"]
    assert fates(original, again, tuned, apart=0.2).lost == [2]
    strict = fates(original, again, tuned, apart=0.92)
    assert (strict.same, strict.fate) == (0.92, ["kept", "new", "new"])


@given(k=st.integers(1, 30), seed=SEEDS, again=st.booleans())
def test_the_same_dictionary_keeps_all(k: int, seed: int, again: bool) -> None:
    """Rounding of cosines near 1 specialises nothing; however well the original is found again."""
    vectors = _drawn(seed, k, 7)
    original = _placed(vectors)
    found = fates(
        original, _placed(vectors if again else vectors + 0.1 * _drawn(seed + 1, k, 7)), _placed(3.3 * vectors)
    )
    assert found.fate == ["kept"] * k
    assert found.lost == []
    assert found.nearest.tolist() == list(range(k))


@given(seed=SEEDS)
def test_what_is_kept_depends_on_what_comes_back(seed: int) -> None:
    """The threshold is the 5 % percentile of the original's own cosines; a model as near to it has as many kept."""
    vectors = normalize(_drawn(seed, 40, 64))
    again = vectors + 0.08 * _drawn(seed + 1, 40, 64)
    tuned = vectors + 0.08 * _drawn(seed + 2, 40, 64)
    found = fates(_placed(vectors), _placed(again), _placed(tuned))
    back = [max(float(torch.cosine_similarity(a, v, dim=0)) for v in vectors) for a in again]
    assert found.same == pytest.approx(np.percentile(back, 5), abs=1e-6)
    assert found.count("kept") >= 32
    far = fates(_placed(vectors), _placed(vectors + 0.01 * _drawn(seed + 1, 40, 64)), _placed(tuned))
    assert far.count("kept") == 0
    assert far.count("specialised") == 40


def test_concepts_without_a_place_are_nothing() -> None:
    """Neither near, nor lost, nor found again; also where every other cosine is below 0."""
    gone = torch.zeros(6)
    original = _placed(torch.stack([gone, torch.eye(6)[0]]))
    again = _placed(torch.stack([torch.eye(6)[0], gone]))
    tuned = _placed(torch.stack([gone, _turned(0, 1, -0.2), torch.eye(6)[0]]))
    found = fates(original, again, tuned)
    assert found.same == pytest.approx(1)
    assert found.nearest.tolist() == [-1, 1, 1]
    assert found.cosine == pytest.approx([np.nan, -0.2, 1], nan_ok=True)
    assert found.fate == ["", "new", "kept"]
    assert found.lost == []
    only = fates(original, again, _placed(gone[None]))
    assert (only.fate, only.lost) == ([""], [1])
    assert fates(original, _placed(gone[None]), tuned).same == 1


def test_cosines_by_hand() -> None:
    """Sizes do not matter; with nothing it is 0."""
    found = cosines(torch.tensor([[3.0, 4], [0, 0]]), torch.tensor([[10.0, 0], [0, -0.1]]))
    assert found.tolist() == [pytest.approx([0.6, -0.8]), [0, 0]]


def test_refusals() -> None:
    """No cosine, no concept to compare with."""
    some = _placed(torch.eye(3))
    with pytest.raises(BadInputError, match=r"apart=1.5"):
        fates(some, some, some, apart=1.5)
    with pytest.raises(BadInputError, match="no concept of the original"):
        fates(_placed(torch.zeros(2, 3)), some, some)
