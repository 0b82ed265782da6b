"""A vector for every concept: what it moves, what it leaves, and what its controls keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from concept_dict.kmeans import KMeans
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.prefix import SharedPrompts
from hooked_mm.steering_vector import SteeringVector
from steering.concept_moves import ConceptMoves
from steering.setting import Setting, side_by_side

HOOK = "blocks.2.hook_resid_post"


def planted(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows in four clusters, the same rows each moved as its cluster is, the moves, and who belongs where."""
    chance = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(4, 16, generator=chance)
    moves = torch.randn(4, 16, generator=chance)
    owner = torch.arange(4).repeat_interleave(30)
    rows = centres[owner] + 0.3 * torch.randn(120, 16, generator=chance)
    return rows, rows + moves[owner], moves, owner


def test_every_row_is_moved_by_its_own_concepts_vector() -> None:
    """Planted moves come back, and rows never seen go where they should."""
    rows, moved, moves, owner = planted()
    found = ConceptMoves.of_pairs(rows, moved, KMeans(4, random_state=0).fit(rows), HOOK)
    main = found.fitted.transform(rows).argmax(dim=1)
    assert torch.allclose(found.vectors[main], moves[owner], atol=1e-4)
    with pytest.raises(BadInputError, match="in pairs"):
        ConceptMoves.of_pairs(rows, moved[:-1], found.fitted, HOOK)


def test_controls_keep_norms_and_dictionary_and_nothing_else() -> None:
    """Random ones are as long, concept by concept; shuffled ones are the same vectors, each another concept's."""
    rows, moved, _, _ = planted()
    found = ConceptMoves.of_pairs(rows, moved, KMeans(4, random_state=0).fit(rows), HOOK, "moves")
    controls = found.controls(range(3))
    assert [one.kind for one in controls] == ["random", "shuffled"] * 3
    for one in controls:
        assert one.fitted is found.fitted
        assert "moves" in one.name
        if one.kind == "random":
            assert torch.allclose(one.vectors.norm(dim=1), found.vectors.norm(dim=1), rtol=1e-5)
            assert float(torch.cosine_similarity(one.vectors, found.vectors).abs().max()) < 0.95
        else:
            # Exactly the same vectors, none at its own place.
            assert sorted(one.vectors.tolist()) == sorted(found.vectors.tolist())
            assert not bool((one.vectors == found.vectors).all(dim=1).any())


def test_beside_other_settings_each_row_has_its_own(llava: HookedMM, images: list[Any]) -> None:
    """Token for token what the intervention alone does, continued from shared prompts too."""
    batch = llava.prepare(images[:4], ["describe the scene ."] * 4)
    _, cache = llava.run_with_cache(batch, HOOK)
    rows = cache[HOOK].reshape(-1, 128)
    chance = torch.Generator().manual_seed(0)
    moves = [
        ConceptMoves(HOOK, KMeans(6, random_state=0).fit(rows), 6 * torch.randn(6, 128, generator=chance), name)
        for name in ("a", "b")
    ]
    plain = SteeringVector(5 * torch.randn(128, generator=chance), HOOK, name="v")
    settings = [Setting(), Setting(moves[0]), Setting(moves[1], 0.5), Setting(plain), Setting(moves[0], 2.0)]
    shared = SharedPrompts(llava, batch)
    said = shared.generate(
        [row for _ in settings for row in range(4)], side_by_side([s for s in settings for _ in range(4)]), 12
    )
    for number, setting in enumerate(settings):
        with llava.hooks(side_by_side([setting] * 4)):
            alone = llava.generate(batch, 12).text
        assert said.text[4 * number : 4 * number + 4] == alone
    assert len({tuple(said.text[4 * n : 4 * n + 4]) for n in range(len(settings))}) == len(settings)


def test_settings_of_other_moves_are_other_settings(tmp_path: Path) -> None:
    """By their numbers; and nothing but adding can be done with them."""
    rows, moved, _, _ = planted()
    fitted = KMeans(4, random_state=0).fit(rows)
    one = ConceptMoves.of_pairs(rows, moved, fitted, HOOK, "m")
    other = ConceptMoves.of_pairs(rows, moved + 1, fitted, HOOK, "m")
    assert Setting(one).fingerprint() == Setting(ConceptMoves(HOOK, fitted, one.vectors, "m")).fingerprint()
    assert Setting(one).fingerprint() != Setting(other).fingerprint()
    assert Setting(one).describe()["layer"] == 2
    assert Setting(one).describe()["kind"] == "moves"
    with pytest.raises(BadInputError, match="only be added"):
        Setting(one, operation="set")
    with pytest.raises(BadInputError, match="a vector per"):
        ConceptMoves(HOOK, fitted, one.vectors[:3])
