"""Where pairs of pictures come from: scenes, MMVP, one's own; what differs in them and where."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from analyses.image_pairs import mmvp_pairs, own_pair, scene_pairs
from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError
from hooked_mm.scenes.pairs import ATTRIBUTES


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_scenes_differ_within_the_mask_alone(attribute: str) -> None:
    """Which is where the object is in either; what a question names is its subject."""
    for pair in scene_pairs(attribute, 3):
        one, other = (np.asarray(image).astype(int) for image in (pair.clean, pair.corrupt))
        changed = torch.from_numpy((one != other).any(axis=2))
        assert changed.any()
        if attribute == "place":
            assert pair.mask is None
            assert pair.subject is None
            continue
        assert pair.mask is not None
        assert not (changed & ~pair.mask).any()
        assert (pair.mask & ~changed).sum() < pair.mask.sum() / 2 or attribute in ("shape", "size")
        if attribute != "count":
            assert pair.subject
            assert pair.subject in pair.question
            assert not pair.subject.startswith("the")


def test_ones_own_pictures_differ_where_more_than_compression_changes_them() -> None:
    """None of those of another size is the place of a difference."""
    one = np.full((6, 8, 3), 100, dtype=np.uint8)
    other = one.copy()
    other[:, :4] += 9
    other[2:4, 5, 1] = 200
    pair = own_pair(Image.fromarray(one), Image.fromarray(other), "what ?", ("a", "b"))
    assert pair.mask is not None
    assert pair.mask.nonzero().tolist() == [[2, 5], [3, 5]]
    assert own_pair(Image.fromarray(one), Image.fromarray(other[:-1]), "what ?", ("a", "b")).mask is None


def sample(number: int, answer: str, text: str = "is it ? (a) yes (b) no") -> Sample:
    """One of MMVP's."""
    picture = Image.new("RGB", (8, 8), (number, 0, 0))
    return Sample(f"mmvp-{number}", picture, text, answer, {"index": number, "pair": (number + 1) // 2})


def test_mmvp_gives_pairs_of_one_question_with_opposite_answers() -> None:
    """Whatever their order; where labels agree or questions differ they are counted."""
    samples = [sample(12, "(b)"), sample(1, "(a)"), sample(11, "(a)"), sample(2, "(b)"), sample(3, "(a)")]
    samples += [sample(4, "(a)"), sample(5, "(a)"), sample(6, "(b)", "is it big ? (a) yes (b) no")]
    pairs, notes = mmvp_pairs(samples)
    assert [pair.id for pair in pairs] == ["mmvp-1", "mmvp-6"]
    assert [pair.answers for pair in pairs] == [("(a)", "(b)")] * 2
    assert [np.asarray(pair.clean)[0, 0, 0] for pair in pairs] == [1, 11]
    assert notes == [
        "1 pairs of MMVP were left out: both answers are the same",
        "1 pairs of MMVP were left out: the questions or their options differ",
    ]
    with pytest.raises(BadInputError, match="1 samples of MMVP's pair 1 are there"):
        mmvp_pairs(samples[1:2])
    with pytest.raises(BadInputError, match="'x' has no picture"):
        mmvp_pairs([Sample("x", None, "", "(a)", {"index": 1, "pair": 1}), sample(2, "(b)", "")])


def test_what_makes_no_pairs_is_refused() -> None:
    """With the value."""
    with pytest.raises(BadInputError, match="count=0"):
        scene_pairs("colour", 0)
    with pytest.raises(BadInputError, match="attribute 'color'"):
        scene_pairs("color", 1)
